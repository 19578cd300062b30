"""Flickr30k's and NoCaps' captions, both in COCO's form.

test1k.token.coco_format, flickr30k-images/1000001.jpg
nocaps_val_4500_captions.json, images/0000000001.jpg
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..language import caption
from .base import Format, Job, write_image, write_json

DOMAINS = ("in-domain", "near-domain", "out-domain")


def write(job: Job, indices: range, folder: Path, *, images: str, count: int) -> list[dict[str, Any]]:
    """Images; returns their names and captions."""
    found = []
    for index in indices:
        scene, rng = job.scene(index)
        name = f"{job.number(index):010d}.jpg"
        write_image(job, scene, folder / images / name)
        texts = [caption(scene, rng).text for _ in range(count)]
        found.append({"id": job.number(index), "file_name": name, "captions": texts})
    return found


def finish(job: Job, results: list[list[dict[str, Any]]], folder: Path, *, file: str, domains: bool) -> None:
    """The annotation file."""
    images, annotations = [], []
    for sample in (s for batch in results for s in batch):
        image = {"id": sample["id"], "file_name": sample["file_name"], "width": job.size, "height": job.size}
        images.append(image | ({"domain": DOMAINS[len(images) % 3]} if domains else {}))
        for text in sample["captions"]:
            annotations.append({"id": len(annotations), "image_id": sample["id"], "caption": text})
    write_json({"images": images, "annotations": annotations}, folder / file)


FORMATS = (
    Format("flickr30k", "images with five captions each, as Flickr30k's test file",
           partial(write, images="flickr30k-images", count=5),
           partial(finish, file="test1k.token.coco_format", domains=False), 100),
    Format("nocaps", "images with ten captions and a domain each, as NoCaps",
           partial(write, images="images", count=10),
           partial(finish, file="nocaps_val_4500_captions.json", domains=True), 100),
)  # fmt: skip
