"""ADE20K: photos, label maps, the maps in colour, and captions.

images/validation/ADE_val_01000001.jpg, annotations/validation/....png, annotations_with_color/validation/....png
validation.json
"""

from __future__ import annotations

from pathlib import Path

import PIL.Image

from mm_interleaved.tasks.ade20k import colored

from .base import Format, Job, write_image, write_json


def write(job: Job, indices: range, folder: Path) -> list[dict[str, str]]:
    """Images and maps; returns the captions."""
    found = []
    for index in indices:
        scene, rng = job.scene(index)
        name = f"ADE_{job.split}_{job.number(index):08d}"
        write_image(job, scene, folder / "images" / _phase(job) / f"{name}.jpg")
        labels = job.world.label_map(scene, job.size)
        images = {"annotations": PIL.Image.fromarray(labels), "annotations_with_color": colored(labels)}
        for part, image in images.items():
            path = folder / part / _phase(job) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        found.append({"image_id": name, "caption": job.world.caption(scene, rng).text.rstrip(".")})
    return found


def finish(job: Job, results: list[list[dict[str, str]]], folder: Path) -> None:
    """The captions."""
    write_json([record for batch in results for record in batch], folder / f"{_phase(job)}.json")


def _phase(job: Job) -> str:
    return "training" if job.split == "train" else "validation"


FORMATS = (Format("ade20k", "label maps with photos and captions, as ADE20K", write, finish, 100),)
