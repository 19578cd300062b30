"""`mmi toyworld`: data sets of the toy world and a look at it.

Help is printed without importing NumPy or torch, so everything else is imported by the command that needs it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, cast

import typer

app = typer.Typer(no_args_is_help=True, help="A small drawn world: data sets, and a look at it.")

Split = Annotated[str, typer.Option(help="train, val or test; they share no arrangement of objects.")]
Seed = Annotated[int, typer.Option(help="Another seed, other data.", min=0)]


@app.command()
def formats() -> None:
    """List the formats that `write` writes."""
    from mm_interleaved.cli.console import output

    from .writers import FORMATS

    for form in FORMATS.values():
        output.print(f"{form.name}: {form.description}", highlight=False)


@app.command()
def write(
    form: Annotated[str, typer.Option("--format", help="For instance vqav2; `mmi toyworld formats` lists them all.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    count: Annotated[int, typer.Option("-n", "--count", help="Number of samples.")],
    split: Split = "train",
    seed: Seed = 0,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 256,
    workers: Annotated[int, typer.Option(help="Processes; 0 for one a core. The data do not depend on it.")] = 0,
    world: Annotated[str, typer.Option(help="base, or shifted: other objects, colors, grounds and words.")] = "base",
) -> None:
    """Write a data set in the files and folders of a published one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mm_interleaved.cli.console import console, output
    from mm_interleaved.cli.errors import UsageError

    from . import sampling
    from .writers import WriteError, write_dataset
    from .writers.base import Job

    job = Job(count, cast(sampling.Split, split), seed, size, world)  # write_dataset checks split and world
    columns = (TextColumn("writing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=count)
        try:
            write_dataset(form, out, job, workers=workers or len(os.sched_getaffinity(0)),
                          progress=lambda done: progress.advance(task, done))  # fmt: skip
        except WriteError as error:
            raise UsageError(str(error)) from None
    output.print(str(out), highlight=False)


@app.command()
def show(
    out: Annotated[Path, typer.Option(help="The PNG file to write.")],
    count: Annotated[int, typer.Option("-n", "--count", help="Number of documents.", min=1, max=200)] = 12,
    split: Split = "train",
    seed: Seed = 0,
    size: Annotated[int, typer.Option(help="Side of the images in pixels, 48 or more.", max=1024)] = 192,
    form: Annotated[str, typer.Option(help="Only documents of this form, for instance story.")] = "",
) -> None:
    """Draw a sheet of documents with their texts. Gray text is given, images in green frames are learned."""
    from mm_interleaved.cli.console import console, output
    from mm_interleaved.cli.errors import UsageError
    from mm_interleaved.io import write_image

    from .documents import FORM_NAMES, DocumentMix, toy_document
    from .sampling import SPLITS
    from .sheet import contact_sheet

    if split not in SPLITS:
        raise UsageError(f"there is no split '{split}'; splits are {', '.join(SPLITS)}")
    if form and form not in FORM_NAMES:
        raise UsageError(f"there is no form '{form}'; forms are {', '.join(FORM_NAMES)}")
    mix = DocumentMix(**{name: float(name == form) for name in FORM_NAMES}) if form else DocumentMix()
    with console.status("drawing"):
        try:
            documents = [toy_document(seed, split, index, size=size, mix=mix) for index in range(count)]
        except ValueError as error:  # the size
            raise UsageError(str(error)) from None
        sheet = contact_sheet(documents, cell=size)
    if not os.path.isdir(out.parent):
        raise UsageError(f"the folder '{out.parent}' does not exist")
    write_image(out, sheet)
    output.print(str(out), highlight=False)
