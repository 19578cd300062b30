"""`mmi finetune`: trains a model by a recipe, or shows what it would be trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .console import console, output
from .errors import UsageError
from .memory import GIB, Force, check_memory, compare_memory, estimate_memory, gpu_memory
from .models import check_cpu
from .options import LoraPreset, ProcessDevice
from .train import end, training

if TYPE_CHECKING:
    from ..data import SourceConfig
    from ..training.config import TrainConfig
    from ..training.memory import BatchSizes
    from .rows_page import SourceSample

PAGE = "check.html"  # in the folder of the run
BATCHES = 8  # that are read of each source for the page


def finetune(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe, or a YAML file of your own; without it, all recipes are listed.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value, replaces a setting: data.root=FOLDER steps=500.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="small, or the folder of a checkpoint.")] = None,
    lora: LoraPreset = None,
    folder: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run; by default runs/finetune/RECIPE.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Write a page about the data and stop.")] = False,
    force: Force = False,
    device: ProcessDevice = None,
) -> None:
    """Fine-tune a model by a recipe. The same command resumes an interrupted run."""
    if recipe is None:
        _list_recipes()
        return
    from ..pretrained import TOKENIZER
    from ..training.recipes import load_recipe

    config = load_recipe(recipe, model, lora, None if folder is None else str(folder), settings or [])
    check_cpu(device)
    with training() as run:
        if check:
            _check(recipe, config, gpu_memory(device), device)
            return
        check_memory(config, device, force)
        stopped = run.train(config, TOKENIZER, device)
    end(stopped)


def _list_recipes() -> None:
    from ..training.recipe_list import list_recipes

    table = Table(title="recipes", title_justify="left", show_header=False)
    for name, description in list_recipes().items():
        table.add_row(name, description)
    output.print(table)
    output.print("mmi finetune RECIPE --model small --check data.root=FOLDER shows what the model would be trained on",
                 highlight=False, soft_wrap=True)  # fmt: skip


def _check(recipe: str, config: TrainConfig, capacity: int | None, device: str | None) -> None:
    """Write the page; an error if a source gives no row.

    Raises:
        UsageError: a source gives no row.
        ValueError: another setting cannot be used. Then there is no page.
    """
    from ..configuration import to_yaml
    from ..io import write_atomic
    from ..training.arguments import training_arguments
    from ..training.building import count_trained
    from .data_training import batch_statistics, find_processor, sample_source
    from .rows_page import RowsPage, SourceSample

    training_arguments(config, device)
    processor = find_processor(config.model)
    data = config.training_data
    samples = []
    for index, source in enumerate(data.sources):
        with console.status(f"reading {source.name}"):
            batches, report, problem = sample_source(data, index, processor, BATCHES)
        samples.append(
            SourceSample(source.name, _describe(source), batches, report, problem, batch_statistics(batches))
        )
    with console.status("counting parameters"):
        trained = [(part.name, part.total, part.trainable) for part in count_trained(config)]
    length = {"steps": f"{config.steps:,}"} if config.steps is not None else {"epochs": f"{config.epochs:g}"}
    facts = {"run in": config.output, **length, "learning rate": f"{config.optimizer.lr:g}"}
    warnings, parts = [_left_out(sample) for sample in samples if not sample.problem], {}
    if (largest := _largest_batch(config, samples)) is not None:
        memory = estimate_memory(config, largest)
        facts["memory"] = str(memory)
        parts = {name: f"{size / GIB:.2f} GiB" for name, size in memory.parts.items()}
        warnings += [] if capacity is None else [compare_memory(memory.total, capacity)]
        output.print(str(memory), highlight=False, soft_wrap=True)
    page = RowsPage(recipe, facts, [w for w in warnings if w], samples, trained, to_yaml(config), parts)
    path = Path(config.output) / PAGE
    write_atomic(path, page.render(processor))
    for warning in page.warnings:
        console.print(warning, style="yellow", highlight=False, soft_wrap=True, markup=False)
    output.print(f"page: {path}", highlight=False, soft_wrap=True)
    if failed := [sample for sample in samples if sample.problem]:
        raise UsageError(_failure(failed[0]))


def _left_out(sample: SourceSample) -> str:
    """What was left out of the rows that were read, and the first reason; "": nothing."""
    reasons = list(sample.report.lines(sample.name))[1:]
    return f"source '{sample.name}' leaves out: {'; '.join(reasons)}" if reasons else ""


def _failure(sample: SourceSample) -> str:
    """Why a source cannot be used, with what was left out."""
    about = "" if sample.problem.startswith("source '") else f"source '{sample.name}': "
    reasons = [line for line in list(sample.report.lines(sample.name))[1:] if line not in sample.problem]
    return "; ".join([about + sample.problem, *reasons])


def _describe(source: SourceConfig) -> str:
    """The settings of a source that decide how its documents become rows."""
    replayed = ", replayed" if source.replay else ""
    return f"type {source.type}, packing {source.packing}, attention within a {source.attention}{replayed}"


def _largest_batch(config: TrainConfig, samples: Sequence[SourceSample]) -> BatchSizes | None:
    """The sizes of a batch of the largest rows that were read; None: none was."""
    from ..training.memory import BatchSizes

    rows = tokens = images = targets = 0
    for source, sample in zip(config.training_data.sources, samples, strict=True):
        rows = max(rows, config.data.batch_size if config.data.mix == "row" else source.batch_size)
        for batch in sample.batches:
            tokens = max(tokens, batch.input_ids.shape[1])
            images = max(images, max(Counter(batch.image_rows.tolist()).values(), default=0))
            targets = max(
                targets, max(Counter(batch.image_rows[batch.image_loss_mask > 0].tolist()).values(), default=0)
            )
    share = config.losses.image_fraction if config.losses.image else 0
    return BatchSizes(rows, tokens, rows * images, round(rows * targets * share)) if tokens else None
