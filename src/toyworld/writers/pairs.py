"""Image-text lists: `0000000.txt`, ... with an object of `image` and `caption` a line, and `images/`."""

from __future__ import annotations

from pathlib import Path

from ..language import caption
from .base import Format, Job, json_lines, nothing_more, write_image

BATCH = 1000


def write(job: Job, indices: range, folder: Path) -> None:
    """One list."""
    shard = f"{indices.start // BATCH:07d}"
    records = []
    for index in indices:
        scene, rng = job.scene(index)
        name = f"{shard}/{index:09d}.jpg"
        write_image(job, scene, folder / "images" / name)
        records.append({"image": name, "caption": caption(scene, rng).text})
    (folder / f"{shard}.txt").write_text(json_lines(records), encoding="utf-8")


FORMAT = Format("pairs", "images with captions, as lists of JSON lines", write, nothing_more, BATCH)
