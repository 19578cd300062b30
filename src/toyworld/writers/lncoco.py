"""Localized Narratives of COCO: `coco_val_captions.jsonl` and `val2017/000001000001.jpg`. Some images have two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..language import paragraph
from .base import Format, Job, json_lines, write_image


def _part(job: Job) -> str:
    """The part of COCO whose names the files have; there are no narratives of its test."""
    return "train" if job.split == "train" else "val"


def write(job: Job, indices: range, folder: Path) -> list[dict[str, Any]]:
    """Images; returns the narratives."""
    found = []
    for index in indices:
        scene, rng = job.scene(index)
        number = job.number(index)
        write_image(job, scene, folder / f"{_part(job)}2017" / f"{number:012d}.jpg")
        for annotator in range(1 + index % 2):
            found.append({"dataset_id": f"mscoco_{_part(job)}2017", "image_id": str(number), "annotator_id": annotator,
                          "caption": paragraph(scene, rng).text})  # fmt: skip
    return found


def finish(job: Job, results: list[list[dict[str, Any]]], folder: Path) -> None:
    """A line each."""
    records = [record for batch in results for record in batch]
    (folder / f"coco_{_part(job)}_captions.jsonl").write_text(json_lines(records), encoding="utf-8")


FORMATS = (Format("lncoco", "long captions, as Localized Narratives of COCO", write, finish, 100),)
