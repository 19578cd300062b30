"""COCO captions of 2014 and the Karpathy files made from them.

    annotations/captions_val2014.json      images and annotations
    annotations/coco_karpathy_val.json     a list of image path and five captions
    annotations/coco_karpathy_val_gt.json  the same as COCO annotations, which scorers read
    val2014/COCO_val2014_000000000001.jpg

As in the original, the images of Karpathy's test split lie in `val2014`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .base import Format, Job, write_image, write_json

CAPTIONS = 5  # of every image


def write(job: Job, indices: range, folder: Path) -> list[dict[str, Any]]:
    """Images; returns their names and captions."""
    part = _part(job)
    found = []
    for index in indices:
        scene, rng = job.scene(index)
        number = index + 1
        name = f"COCO_{part}_{number:012d}.jpg"
        write_image(job, scene, folder / part / name)
        found.append(
            {"id": number, "file": name, "captions": [job.world.caption(scene, rng).text for _ in range(CAPTIONS)]}
        )
    return found


def finish(job: Job, results: list[list[dict[str, Any]]], folder: Path) -> None:
    """The annotation files."""
    part, samples = _part(job), [sample for batch in results for sample in batch]
    annotations = [
        {"id": CAPTIONS * (sample["id"] - 1) + k, "image_id": sample["id"], "caption": text}
        for sample in samples
        for k, text in enumerate(sample["captions"], 1)
    ]
    images = [{"id": s["id"], "file_name": s["file"], "width": job.size, "height": job.size} for s in samples]
    about = {"description": f"Toy world, {job.split} split, seed {job.seed}", "version": "1.0"}
    everything = {"info": about, "licenses": [], "images": images, "annotations": annotations}
    folder = folder / "annotations"
    write_json(everything, folder / f"captions_{part}.json")
    write_json(everything, folder / f"coco_karpathy_{job.split}_gt.json")
    karpathy = [{"image": f"{part}/{s['file']}", "caption": s["captions"]} for s in samples]
    write_json(karpathy, folder / f"coco_karpathy_{job.split}.json")


def _part(job: Job) -> str:
    return "train2014" if job.split == "train" else "val2014"


FORMAT = Format("coco", "images with five captions each, as COCO and Karpathy annotations", write, finish, 100)
