"""Writes the toy world as data sets in the files and folders that their readers expect."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from ..documents import SMALLEST
from ..sampling import SPLITS
from ..worlds import BASE, WORLDS
from . import (
    ade20k,
    captions,
    coco,
    documents,
    llava,
    lncoco,
    mmc4,
    pairs,
    paragraphs,
    regions,
    stories,
    visdial,
    vqa,
    webdataset,
)
from .base import VERSION, Format, Job

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        mmc4.FORMAT, pairs.FORMAT, webdataset.FORMAT, coco.FORMAT, documents.FORMAT, *captions.FORMATS,
        *paragraphs.FORMATS, *vqa.FORMATS, *visdial.FORMATS, *regions.FORMATS, *lncoco.FORMATS, *ade20k.FORMATS,
        *stories.FORMATS, *llava.FORMATS,
    )
}  # fmt: skip
ABOUT = "toyworld.json"  # beside the data: what they are
LARGEST = 4096  # pixels of an image's side


class WriteError(ValueError):
    """A data set that cannot be written as it was asked for."""


def write_dataset(name: str, out: str | Path, job: Job, *, workers: int = 1,
                  progress: Callable[[int], None] | None = None) -> None:  # fmt: skip
    """Write a data set; the folder is there whole or not at all.

    Args:
        name: of `FORMATS`.
        out: the folder; it must not exist, or be empty.
        job: what to write. The same job makes the same files, however many processes write them.
        workers: processes.
        progress: called after each batch with the number of its samples.

    Raises:
        WriteError: something asked for is not possible, or the folder is occupied or cannot be made.
    """
    _check(name, job, workers)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WriteError(f"'{out}' exists and is not empty; remove it or name another folder")
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise WriteError(f"cannot make a folder beside '{out}': {error.strerror}") from None
    try:
        _write_into(FORMATS[name], aside, job, workers, progress)
        if out.exists():
            out.rmdir()
        aside.replace(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_into(form: Format, folder: Path, job: Job, workers: int, progress: Callable[[int], None] | None) -> None:
    batches = [range(start, min(start + form.batch, job.count)) for start in range(0, job.count, form.batch)]
    results = []
    for batch, result in zip(batches, _results(form, folder, job, batches, workers), strict=True):
        results.append(result)
        if progress is not None:
            progress(len(batch))
    form.finish(job, results, folder)
    about = {"format": form.name, "count": job.count, "split": job.split, "seed": job.seed, "size": job.size}
    about |= {} if job.world_name == BASE else {"world": job.world_name}
    (folder / ABOUT).write_text(json.dumps({"toyworld": VERSION, **about}, indent=2) + "\n", encoding="utf-8")


def _results(form: Format, folder: Path, job: Job, batches: list[range], workers: int) -> Iterator[Any]:
    """What `write` returns for each batch, in order."""
    if min(workers, len(batches)) == 1:
        yield from (form.write(job, batch, folder) for batch in batches)
        return
    pool = ProcessPoolExecutor(min(workers, len(batches)), mp_context=_processes())
    try:
        yield from pool.map(_write_batch, [(form.name, job, batch, folder) for batch in batches])
    finally:
        pool.shutdown(cancel_futures=True)


def _processes() -> BaseContext:
    """Where worker processes come from. Not from this one: forking it may hang if libraries have started threads."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once for all workers
    return context


def _write_batch(task: tuple[str, Job, range, Path]) -> Any:
    name, job, batch, folder = task
    return FORMATS[name].write(job, batch, folder)


def _check(name: str, job: Job, workers: int) -> None:
    if name not in FORMATS:
        raise WriteError(f"there is no format '{name}'; formats are {', '.join(FORMATS)}")
    if job.world_name not in WORLDS:
        raise WriteError(f"there is no world '{job.world_name}'; worlds are {', '.join(WORLDS)}")
    own = job.world.formats
    if own is not None and name not in own:
        raise WriteError(f"the world '{job.world_name}' is not written as '{name}', but as {', '.join(own)}")
    if job.split not in SPLITS:
        raise WriteError(f"there is no split '{job.split}'; splits are {', '.join(SPLITS)}")
    if not SMALLEST <= job.size <= LARGEST:
        raise WriteError(f"images of {job.size} pixels cannot be written; give {SMALLEST} to {LARGEST}")
    for what, value, least in (("samples", job.count, 1), ("workers", workers, 1), ("seed", job.seed, 0)):
        if value < least:
            raise WriteError(f"{what}: {value} is too small; give at least {least}")
