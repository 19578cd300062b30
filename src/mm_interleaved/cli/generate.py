"""`mmi generate`: fills and continues the documents of a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..io import InputError, lock_folder
from .console import console, output
from .errors import UsageError
from .models import ModelOptions, note_random_weights
from .options import (
    Adapters,
    AllowOtherBase,
    Device,
    Dtype,
    GenerationChanges,
    ImagePreset,
    ImageRoot,
    ModelName,
    Offload,
    QuantizationName,
    Seed,
    TextPreset,
)  # fmt: skip

if TYPE_CHECKING:
    from ..document import Document
    from ..generation import DocumentFinished, Event, GenerationSettings, InterleavedGenerator
    from ..generation.interleaved import PreparedDocument
    from ..pretrained import Loaded
    from .results import ResultsFolder


def generate(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="JSON or JSON lines with documents.")],
    settings: GenerationChanges = None,
    *,
    output_folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for images, results.json, report.html.")
    ],
    model: ModelName = "small",
    adapter: Adapters = None,
    allow_other_base: AllowOtherBase = False,
    seed: Seed = None,
    preset: TextPreset = "interleaved",
    image_preset: ImagePreset = "ddpm-30",
    image_root: ImageRoot = None,
    batch_size: Annotated[int, typer.Option(help="Documents that are generated together.", min=1)] = 1,
    device: Device = "auto",
    dtype: Dtype = None,
    quantization: QuantizationName = None,
    offload: Offload = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in the folder.")] = False,
    shared: Annotated[
        bool, typer.Option("--shared", help="Share the work with every process that runs the same command.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="As --shared, but do only the I-th of N parts (from 0).")
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Documents that a process takes at a time, if shared.", min=1)] = 64,
) -> None:
    """Fill the open slots of documents and continue them, with text and images.

    Writes the images, results.json (the original's fields and ours) and report.html into the output folder. Shared
    work (--shared, --shard, torchrun, srun) gives results.jsonl, in which each document is exactly once.
    """
    from ..batch.records import describe_run
    from ..batch.shared import SharedRun
    from ..document import load_documents
    from ..launch import count_processes, join_processes
    from .results import ResultsFolder, refuse_occupied
    from .shared import check_shared, own_device, own_shards, run_shared

    join_processes()
    options = ModelOptions(model, device, dtype, quantization, adapter, allow_other_base, offload)
    chosen = read_settings(preset, image_preset, settings or [], seed)
    if shared or shard is not None or count_processes() > 1:
        own_shards(shard, range(0))
        check_shared(output_folder, source, overwrite)
        loaded = replace(options, device=own_device(device)).load()
        generator = _generator(loaded, chosen)
        run = SharedRun(output_folder, source, describe_run(loaded, generator.settings), shard_size=shard_size,
                        batch_size=batch_size, image_root=image_root)  # fmt: skip
        note_random_weights(loaded)
        run_shared(run, generator, shard)
        return
    refuse_occupied(output_folder, resume, overwrite)
    documents = load_documents(source, image_root, look_in=[Path.cwd()])
    for document in documents:
        check_images(document)
    loaded = options.load()
    generator = _generator(loaded, chosen)
    prepared = generator.prepare_all(documents)  # raises for inputs that cannot be used
    with lock_folder(output_folder):
        folder = ResultsFolder(output_folder, source, loaded, generator.settings, resume, overwrite)
        note_random_weights(loaded)
        _run(generator, prepared, folder, batch_size)


def _generator(loaded: Loaded, settings: GenerationSettings) -> InterleavedGenerator:
    """The generator of a model.

    Raises:
        UsageError: images cannot be generated with these settings.
    """
    from ..generation import InterleavedGenerator

    try:
        generator = InterleavedGenerator(loaded.model, loaded.processor, settings)
        generator.prepare_all([])
    except InputError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from None
    return generator


def read_settings(preset: str, image_preset: str, pairs: list[str], seed: int | None) -> GenerationSettings:
    """The presets with the changes of the command line."""
    from ..configuration import read_overrides
    from ..generation.settings import IMAGE_PRESETS, TEXT_PRESETS, GenerationSettings, override

    for option, name, known in (("--preset", preset, TEXT_PRESETS), ("--image-preset", image_preset, IMAGE_PRESETS)):
        if name not in known:
            raise UsageError(f"{option} must be one of {', '.join(known)}, not '{name}'")
    given = read_overrides(pairs)
    if empty := [name for name, value in given.items() if value is None]:
        raise UsageError(f"'{empty[0]}' has no value; give one, or leave it out to keep that of the preset")
    changes = {"seed": seed, **given}
    if changes.get("num_beams") not in (None, 1):
        changes.setdefault("do_sample", False)  # presets sample, and beam search does not
    try:
        start = GenerationSettings(text=TEXT_PRESETS[preset], image=IMAGE_PRESETS[image_preset].settings)
        return override(start, **changes)
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_images(document: Document) -> None:
    """Read every given image once, so that a bad one is reported before generation starts."""
    from ..io.images import load_image

    for index, segment in enumerate(document.segments):
        for image in (getattr(segment, "source", None), getattr(segment, "target", None)):
            if image is not None:
                try:
                    load_image(image, f"segments[{index}]")
                except InputError as error:
                    raise error.at(document.name) from None


def _run(
    generator: InterleavedGenerator, documents: Sequence[PreparedDocument], folder: ResultsFolder, batch_size: int
) -> None:
    """Generate the documents that are not done yet; the report is written even if that is interrupted."""
    try:
        _generate(generator, documents, folder, batch_size)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted:[/] continue with --resume")
        raise
    finally:
        if folder.done:
            report = folder.finish()
            output.print(f"{folder.done} of {len(documents)} documents in {folder.folder}")
            output.print(str(report))


def _generate(
    generator: InterleavedGenerator, documents: Sequence[PreparedDocument], folder: ResultsFolder, batch_size: int
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        overall = progress.add_task("documents", total=len(documents), completed=folder.done)
        current = progress.add_task("", total=None)
        for begin in range(folder.done, len(documents), batch_size):
            batch = documents[begin : begin + batch_size]
            finished = _follow(generator.run(batch), begin, folder, progress, current)
            for offset in range(len(batch)):  # in the order of the file, not of finishing
                folder.add_document(begin + offset, finished[offset].result, finished[offset].reason)
                progress.advance(overall)


def _follow(
    events: Iterable[Event], begin: int, folder: ResultsFolder, progress: Progress, task
) -> dict[int, DocumentFinished]:
    """Print progress and save finished images. Returns how each document ended, by its number."""
    from ..generation import DocumentFinished, ImageProgress, SegmentFinished, TextDelta

    finished: dict[int, DocumentFinished] = {}
    for event in events:
        name = f"document {begin + event.document}"
        if isinstance(event, TextDelta):
            progress.update(task, description=f"{name}: generating text", total=None)
        elif isinstance(event, ImageProgress):
            progress.update(task, description=f"{name}: generating an image", total=event.total, completed=event.step)
        elif isinstance(event, SegmentFinished):
            for path in folder.save_candidates(begin + event.document, event.segment):
                progress.console.print(f"{name}: {path}", highlight=False)
        elif isinstance(event, DocumentFinished):
            finished[event.document] = event
    return finished
