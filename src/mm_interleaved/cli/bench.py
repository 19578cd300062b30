"""`mmi bench`: times on this machine, the limits of the machine, and times of the reference implementations."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..io import read_json, write_atomic, write_json
from .console import console, output
from .errors import UsageError
from .models import find_device, find_dtype, find_quantization
from .options import Device, QuantizationName


def bench(
    preset: Annotated[str, typer.Option(help="Size of the model: release, small or debug.")] = "small",
    device: Device = "auto",
    dtype: Annotated[str | None, typer.Option(help="Type of the weights; default: bfloat16 on a GPU.")] = None,
    only: Annotated[
        str | None, typer.Option(help="Lines to run, separated by commas; default: the standard ones.")
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which no further row is started.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Of the session.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of an image.", min=1)] = None,
    compile_unet: Annotated[bool, typer.Option("--compile", help="Also generate images with a compiled UNet.")] = False,
    quantization: QuantizationName = None,
    mmfs: Annotated[str | None, typer.Option(help="Backend of MMFS in the model: plain, triton or auto.")] = None,
    output_file: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON file to write, with a table (.md) and plots (.png) next to it."),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two JSON files to compare; nothing is measured.")
    ] = None,
) -> None:
    """Measure the model's work, with random weights: decoding, images, prefill, MMFS, sessions, a training step."""
    from ..bench import report

    if compare is not None:
        Console(width=max(output.width, 150)).print(report.comparison(*(_read(path) for path in compare)))
        return
    from ..bench import LINES, run
    from ..bench.base import SIZES, Bench
    from ..bench.machine import describe

    if preset not in SIZES:
        raise UsageError(f"--preset must be one of {', '.join(SIZES)}, not '{preset}'")
    names = run.USUAL if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        if name not in LINES:
            raise UsageError(f"there is no line '{name}'; there are {', '.join(LINES)}")
    where = find_device(device)
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    kind = find_dtype(dtype)
    matrices = find_quantization(quantization)
    sizes = SIZES[preset]
    sizes = replace(sizes, rounds=rounds or sizes.rounds, steps=steps or sizes.steps)
    sizes = replace(sizes, reference_rounds=min(sizes.reference_rounds, sizes.rounds))
    subject = Bench(preset, where, kind, sizes, compile_unet, mmfs, matrices, say=console.print)
    result = {**describe(), "preset": preset, "dtype": dtype, "mmfs": mmfs or "auto",
              "quantization": quantization or "none", **vars(subject.speed),
              "rows": [], "trouble": []}  # fmt: skip
    for found in run.run_lines(subject, names, time_limit):
        if isinstance(found, run.Trouble):
            result["trouble"].append(asdict(found))
            console.print(f"{found.line}: {found.reason}", style="yellow", markup=False)
        else:
            result["rows"].append(asdict(found) | {"ratio": found.ratio, "of_bound": found.of_bound})
            output.print(report.line(found), markup=False, highlight=False)
        _keep(result, output_file)
    if output_file is not None:
        for path in report.plots(result, output_file.parent, output_file.stem):
            console.print(f"plotted {path}")
    if result["trouble"]:
        raise typer.Exit(2)


def _keep(result: dict[str, Any], path: Path | None) -> None:
    """Write the results so far, so that an interrupted run leaves them."""
    from ..bench import report

    if path is None:
        return
    write_json(path, result, indent=1)
    write_atomic(path.with_suffix(".md"), report.markdown(result))


def _read(path: Path) -> dict[str, Any]:
    try:
        result = read_json(path, dict)
        if not {"rows", "date", "gpu"} <= result.keys():
            raise ValueError("it is no result of `mmi bench`")
    except ValueError as error:
        raise UsageError(f"'{path}' cannot be compared: {error}") from None
    return result
