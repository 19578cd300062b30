"""Documents in this project's own form: `documents.jsonl` and `images/`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image

from mm_interleaved.document import Image

from ..documents import toy_document
from .base import Format, Job, json_lines


def write(job: Job, indices: range, folder: Path) -> list[dict[str, Any]]:
    """Images; returns the records."""
    (folder / "images").mkdir(exist_ok=True)
    records = []
    for index in indices:
        document = toy_document(job.seed, job.split, index, size=job.size)
        for number, segment in enumerate(document.segments):
            if isinstance(segment, Image) and isinstance(segment.source, PIL.Image.Image):
                name = f"images/{index:08d}-{number}.png"
                segment.source.save(folder / name)
                document.segments[number] = replace(segment, source=name)
        records.append(document.to_dict())
    return records


def finish(job: Job, results: list[list[dict[str, Any]]], folder: Path) -> None:
    """All records in one file."""
    records = [record for batch in results for record in batch]
    (folder / "documents.jsonl").write_text(json_lines(records), encoding="utf-8")


FORMAT = Format("documents", "every form of document, as documents.jsonl", write, finish, 100)
