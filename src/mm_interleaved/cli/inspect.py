"""`mmi inspect`: generate a document, and show where MMFS looks for every word and every part of an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.models import OptionInfo

from ..io import InputError
from .console import console, output
from .errors import UsageError
from .generate import check_images, read_settings
from .models import ModelOptions, note_random_weights
from .options import (
    Adapters,
    AllowOtherBase,
    Device,
    GenerationChanges,
    ImagePreset,
    ImageRoot,
    ModelName,
    Seed,
    TextPreset,
)  # fmt: skip

if TYPE_CHECKING:
    from ..document import Document
    from ..generation import Event, GenerationSettings
    from ..inspection import Inspection, InspectionSettings
    from ..inspection.results import Box
    from ..pretrained import Loaded


def _list_of(item: str, text: str) -> OptionInfo:
    """An option that takes a list, separated by commas."""
    return typer.Option(metavar=f"{item},...", help=text)


def inspect_command(
    source: Annotated[Path, typer.Argument(metavar="DOCUMENT", help="JSON or JSON lines with documents.")],
    settings: GenerationChanges = None,
    *,
    output_folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the page, the arrays and the heat maps.")
    ],
    number: Annotated[int, typer.Option("--document", help="Which document of the file, from 1.", min=1)] = 1,
    model: ModelName = "small",
    adapter: Adapters = None,
    allow_other_base: AllowOtherBase = False,
    layers: Annotated[str | None, _list_of("N", "Decoder layers; default: all with MMFS.")] = None,
    heads: Annotated[str | None, _list_of("N", "Heads; default: all.")] = None,
    places: Annotated[str | None, _list_of("N", "Maps of the UNet, the last one is its middle; default: all.")] = None,
    steps: Annotated[str | None, _list_of("N", "Denoising steps; default: the first, the middle, the last.")] = None,
    cells: Annotated[
        int | None, typer.Option(help="Most cells of a side of a map; default: all cells.", min=1)
    ] = None,
    levels: Annotated[str | None, _list_of("N", "Sides of the levels that count in heat maps; default: all.")] = None,
    words: Annotated[str | None, _list_of("WORD", "Words of the heat maps; default: all.")] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(metavar="X0,Y0,X1,Y1",
                     help="Region of the heat maps, in shares of the image; repeatable. Default: 3 by 3."),
    ] = None,
    compare: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="A B", help="Two images, from 1: which of them is looked at for each word and region."),
    ] = None,
    most_mib: Annotated[int, typer.Option(help="Most memory of the arrays, in MiB.", min=1)] = 512,
    seed: Seed = None,
    preset: TextPreset = "interleaved",
    image_preset: ImagePreset = "ddpm-30",
    image_root: ImageRoot = None,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier inspection.")] = False,
) -> None:  # fmt: skip
    """Generate a document, and show where MMFS looks meanwhile.

    Writes inspection.html (interactive, needs no other file), heat maps, and the arrays (inspection.json, arrays.npz)
    into the output folder. The result is that of mmi generate without CUDA graphs.
    """
    from ..inspection import InspectionSettings, write_results

    options = ModelOptions(model, device, adapters=adapter, allow_other_base=allow_other_base)
    chosen = read_settings(preset, image_preset, settings or [], seed)
    collected = InspectionSettings(_numbers(layers, "--layers"), _numbers(heads, "--heads"),
                                   _numbers(places, "--places"), _numbers(steps, "--steps"), cells,
                                   most_mib)  # fmt: skip
    wanted = None if words is None else [word.strip() for word in words.split(",")]
    regions = None if region is None else [_region(text) for text in region]
    shown, compared = _numbers(levels, "--levels"), _images(compare)
    _check_output(output_folder, overwrite)
    document = _read_document(source, number, image_root)
    loaded = options.load()
    note_random_weights(loaded)
    found = _inspect(loaded, document, chosen, collected)
    comparison = write_results(found, output_folder, words=wanted, regions=regions, levels=shown, compared=compared,
                               replace=overwrite)  # fmt: skip
    _print(found, comparison, compare)
    output.print(str(output_folder / "inspection.html"))


def _numbers(text: str | None, option: str) -> list[int] | None:
    """Numbers separated by commas; "none": an empty list; None: None.

    Raises:
        UsageError: they have another form.
    """
    if text is None or text == "none":
        return None if text is None else []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} takes numbers separated by commas, or none, not '{text}'") from None


def _region(text: str) -> Box:
    """The sides of a region.

    Raises:
        UsageError: they are not four shares with an area.
    """
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        x0 = y0 = x1 = y1 = -1.0
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise UsageError(f"--region takes X0,Y0,X1,Y1 from 0 to 1, such as 0,0,0.5,0.5, not '{text}'")
    return x0, y0, x1, y1


def _images(numbers: tuple[int, int] | None) -> tuple[int, int] | None:
    """The two images of `--compare`, from 0.

    Raises:
        UsageError: they are not the numbers of two images.
    """
    if numbers is None:
        return None
    if min(numbers) < 1 or numbers[0] == numbers[1]:
        raise UsageError("--compare takes the numbers of two different images, from 1")
    return numbers[0] - 1, numbers[1] - 1


def _check_output(folder: Path, overwrite: bool) -> None:
    """Refuse to replace what is not an inspection, before anything is generated.

    Raises:
        UsageError: the folder has other files, or an inspection that may not be replaced.
    """
    from ..inspection.files import RECORD

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / RECORD).is_file():
        raise UsageError(f"'{folder}' exists and is not an inspection; name another folder")
    if not overwrite:
        raise UsageError(f"'{folder}' has an inspection already; --overwrite replaces it")


def _read_document(source: Path, number: int, image_root: Path | None) -> Document:
    """The document of that number, from 1; its images can be read.

    Raises:
        InputError: the file has no such document, or it cannot be used.
    """
    from ..document import load_documents

    documents = load_documents(source, image_root, look_in=[Path.cwd()])
    if number > len(documents):
        raise UsageError(f"'{source}' has {len(documents)} documents; there is no number {number}")
    document = documents[number - 1]
    check_images(document)
    return document


def _inspect(
    loaded: Loaded, document: Document, settings: GenerationSettings, collected: InspectionSettings
) -> Inspection:
    """Generate the document, collect where MMFS looks, and show progress.

    Raises:
        UsageError: images cannot be generated with these settings.
    """
    from ..generation import DocumentFinished
    from ..inspection import InspectedGenerator

    try:
        generator = InspectedGenerator(loaded.model, loaded.processor, settings, collected)
    except InputError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from None
    with console.status("generating") as status:
        for event in generator.run([document]):
            status.update(_progress(event))
            if isinstance(event, DocumentFinished):
                return generator.inspection_of(0, event)
    raise AssertionError("a run ends with DocumentFinished")


def _progress(event: Event) -> str:
    from ..generation import ImageProgress

    return f"denoising {event.step} of {event.total}" if isinstance(event, ImageProgress) else "generating text"


def _print(found: Inspection, comparison: Sequence[dict], compared: tuple[int, int] | None) -> None:
    """Print a table of shares: of all images for every text and image, or of two for every word and region."""
    from rich.table import Table

    from ..inspection import units_of

    images = [f"image {number}" for number in compared] if compared else ["images"]
    table = Table("segment", "word or region", *images, "ignored", box=None)
    if compared is None:
        for unit in units_of(found):
            shares = ", ".join(f"{image + 1}: {100 * share:.0f} %" for image, share in sorted(unit.shares().items()))
            table.add_row(str(unit.segment), unit.name, shares or "none", f"{100 * unit.ignored:.0f} %")
    for one in comparison:
        table.add_row(str(one["segment"]), one["unit"], *(f"{100 * share:.0f} %" for share in one["shares"]),
                      f"{100 * one['ignored']:.0f} %")  # fmt: skip
    output.print(table)
