"""`mmi toyworld`: data sets of the toy world, and a look at it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from toyworld import sampling
from toyworld.documents import FORM_NAMES, SMALLEST, DocumentMix, toy_document
from toyworld.sampling import SPLITS
from toyworld.sheet import contact_sheet
from toyworld.writers import FORMATS, WriteError, write_dataset
from toyworld.writers.base import Job

from ..files import write_atomic
from .console import console, output
from .errors import UsageError

toyworld = typer.Typer(no_args_is_help=True, help="A small drawn world: write data sets of it, or look at it.")

_formats = "; ".join(f"{f.name}: {f.description}" for f in FORMATS.values())
Split = Annotated[str, typer.Option(help=f"{', '.join(SPLITS)}; they share no arrangement of objects.")]
Seed = Annotated[int, typer.Option(help="Another seed, other data.", min=0)]


@toyworld.command()
def write(
    form: Annotated[str, typer.Option("--format", help=_formats)],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    count: Annotated[int, typer.Option("-n", "--count", help="Number of samples.")],
    split: Split = "train",
    seed: Seed = 0,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 256,
    workers: Annotated[int, typer.Option(help="Processes; 0 for one a core. The data do not depend on it.")] = 0,
) -> None:
    """Write a data set in the files and folders of a published one."""
    job = Job(count, cast(sampling.Split, split), seed, size)  # write_dataset checks the split
    columns = (TextColumn("writing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=count)
        try:
            write_dataset(form, out, job, workers=workers or len(os.sched_getaffinity(0)),
                          progress=lambda done: progress.advance(task, done))  # fmt: skip
        except WriteError as error:
            raise UsageError(str(error)) from None
    output.print(str(out), highlight=False)


@toyworld.command()
def show(
    out: Annotated[Path, typer.Option(help="The PNG file to write.")],
    count: Annotated[int, typer.Option("-n", "--count", help="Number of documents.", min=1, max=200)] = 12,
    split: Split = "train",
    seed: Seed = 0,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.", min=SMALLEST, max=1024)] = 192,
    form: Annotated[str, typer.Option(help=f"Only of this form: {', '.join(FORM_NAMES)}.")] = "",
) -> None:
    """Draw a sheet of documents with their texts. Gray text is given, images in green frames are learned."""
    if split not in SPLITS:
        raise UsageError(f"there is no split '{split}'; splits are {', '.join(SPLITS)}")
    if form and form not in FORM_NAMES:
        raise UsageError(f"there is no form '{form}'; forms are {', '.join(FORM_NAMES)}")
    mix = DocumentMix(**{name: float(name == form) for name in FORM_NAMES}) if form else DocumentMix()
    with console.status("drawing"):
        documents = [toy_document(seed, split, index, size=size, mix=mix) for index in range(count)]
        buffer = io.BytesIO()
        contact_sheet(documents, cell=size).save(buffer, "PNG")
    if not out.parent.is_dir():
        raise UsageError(f"the folder '{out.parent}' does not exist")
    write_atomic(out, buffer.getvalue())
    output.print(str(out), highlight=False)
