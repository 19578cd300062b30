"""Image2Paragraph: `annotations/paragraphs_coco.json`, `annotations/test_split.json`, `images/VG_100K/1000001.jpg`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..language import paragraph
from .base import Format, Job, write_image, write_json


def write(job: Job, indices: range, folder: Path) -> list[dict[str, Any]]:
    """Images; returns the annotations."""
    found = []
    for index in indices:
        scene, rng = job.scene(index)
        number = job.number(index)
        name = f"VG_100K{'_2' if index % 2 else ''}/{number}.jpg"
        write_image(job, scene, folder / "images" / name)
        url = f"https://toyworld.invalid/images/{name}"
        found.append({"id": number, "image_id": number, "caption": paragraph(scene, rng).text, "url": url})
    return found


def finish(job: Job, results: list[list[dict[str, Any]]], folder: Path) -> None:
    """The annotation files."""
    annotations = [record for batch in results for record in batch]
    images = [{"id": record["image_id"]} for record in annotations]
    write_json({"images": images, "annotations": annotations}, folder / "annotations" / "paragraphs_coco.json")
    write_json([record["image_id"] for record in annotations], folder / "annotations" / f"{job.split}_split.json")


FORMATS = (Format("image2paragraph", "images with a paragraph each, as Image2Paragraph", write, finish, 100),)
