"""Image-text pairs as webdataset shards: `00000.tar`, ... with `<key>.jpg` and `<key>.json` (its `caption`)."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from ..draw import draw
from ..language import caption
from .base import Format, Job, jpeg, nothing_more

BATCH = 1000


def write(job: Job, indices: range, folder: Path) -> None:
    """One shard."""
    with tarfile.open(folder / f"{indices.start // BATCH:05d}.tar", "w") as archive:
        for index in indices:
            scene, rng = job.scene(index)
            key = f"{index:09d}"
            record = {"key": key, "caption": caption(scene, rng).text}
            _add(archive, f"{key}.jpg", jpeg(draw(scene, job.size)))
            _add(archive, f"{key}.json", json.dumps(record).encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


FORMAT = Format("webdataset", "images with captions, as tar shards", write, nothing_more, BATCH)
