"""`mmi evaluate`: evaluates a model on the tasks of a YAML file, also under torchrun."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..io import OutputError, lock_folder
from .console import console, output
from .errors import UsageError
from .models import ModelOptions, check_cpu, find_quantization, note_random_weights
from .options import Adapters, FileChanges, Offload, ProcessDevice, QuantizationName

if TYPE_CHECKING:
    from accelerate import PartialState

    from ..evaluation import Results


def evaluate_command(
    config: Annotated[Path, typer.Argument(help="YAML file of an evaluation; see configs/.", metavar="CONFIG")],
    settings: FileChanges = None,
    adapter: Adapters = None,
    quantization: QuantizationName = None,
    offload: Offload = False,
    device: ProcessDevice = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier results in the folder.")] = False,
) -> None:
    """Evaluate a model on tasks. The same command resumes an interrupted evaluation."""
    import torch

    from ..configuration import load_config
    from ..evaluation import EvaluateConfig, evaluate
    from ..evaluation.predictions import remove_results
    from ..evaluation.processes import on_main, start_processes
    from ..evaluation.report import problems
    from .gallery import write_gallery

    loaded = load_config(config, EvaluateConfig, settings or [])
    if adapter:
        loaded = replace(loaded, adapters=[*loaded.adapters, *map(str, adapter)])
    loaded = replace(loaded, quantization=find_quantization(quantization) or loaded.quantization,
                     offload=offload or loaded.offload)  # fmt: skip
    check_cpu(device)
    state = start_processes(cpu=device == "cpu" or not torch.cuda.is_available())
    folder = Path(loaded.output)
    with _once(state), ExitStack() as stack:
        on_main(state, lambda: stack.enter_context(lock_folder(folder)))
        if overwrite:
            on_main(state, lambda: remove_results(folder))
        options = ModelOptions(loaded.model, str(state.device), loaded.dtype, loaded.quantization, loaded.adapters,
                               loaded.allow_other_base, loaded.offload)  # fmt: skip
        model = options.load(quiet=not state.is_main_process)
        if state.is_main_process:
            note_random_weights(model)
        results = evaluate(
            loaded, model.model, model.processor, folder, name=model.name, trained=model.trained, state=state,
            console=console,
            on_scored=lambda given, scores, result: write_gallery(given, scores, result, loaded.gallery),
        )  # fmt: skip
        if results is not None:
            _show(results, folder)
            if failed := problems(results.tasks):
                names = "\n".join(f"{name}: {why}" for name, why in failed.items())
                raise UsageError(f"not everything could be evaluated.\n{names}")


@contextmanager
def _once(state: PartialState) -> Iterator[None]:
    """Let only the main process report an error that all processes raise; processes that have finished wait for it."""
    from ..launch import peers

    try:
        yield
        state.wait_for_everyone()
    except (ValueError, OutputError):
        peers.disconnect()  # all have the same error
        if state.is_main_process:
            raise
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if state.is_main_process:
            console.print("[yellow]interrupted:[/] the same command resumes from here")
        raise
    finally:
        peers.disconnect(sys.exception())
        state.destroy_process_group()


def _show(results: Results, folder: Path) -> None:
    from ..evaluation.report import shown_values, skipped
    from ..evaluation.run import RESULTS, TABLE
    from .gallery import GALLERY

    table = Table()
    for name in ("task", "metric", "value", "95% interval", "samples"):
        table.add_column(name)
    for name, task in results.tasks.items():
        shown = shown_values(task) or [("failed" if task.failed else "-", float("nan"), "")]
        for metric, value, interval in shown:
            table.add_row(escape(name), metric, "" if value != value else f"{value:.2f}", interval, str(task.evaluated))
    output.print(table)
    for line in skipped(results.tasks):
        output.print(line, highlight=False, markup=False)
    for path in (folder / RESULTS, folder / TABLE):
        output.print(str(path), highlight=False, markup=False)
    if any((folder / name / GALLERY).is_file() for name in results.tasks):
        output.print(str(folder / "*" / GALLERY), highlight=False, markup=False)
