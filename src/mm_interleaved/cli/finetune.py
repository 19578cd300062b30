"""`mmi finetune`: trains a model by a recipe, or shows what it would be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .console import console, output
from .errors import UsageError
from .models import check_cpu
from .train import Device, training

if TYPE_CHECKING:
    from ..training.config import TrainConfig

PAGE = "check.html"  # in the folder of the run
BATCHES = 8  # that are read of each source for the page


def finetune(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe, or a YAML file of your own; without it, all recipes are listed.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value, replaces a setting: data.root=FOLDER steps=500.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="small, or the folder of a checkpoint.")] = None,
    lora: Annotated[str | None, typer.Option(help="Train an adapter: llm, image, both, mmfs or all.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--output", help="Folder of the run; by default runs/finetune/RECIPE.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Write a page about the data and stop.")] = False,
    device: Device = None,
) -> None:
    """Fine-tune a model by a recipe. The same command resumes an interrupted run."""
    if recipe is None:
        _list_recipes()
        return
    from ..pretrained import TOKENIZER
    from ..training.recipes import load_recipe

    config = load_recipe(recipe, model, lora, None if folder is None else str(folder), settings or [])
    check_cpu(device)
    if check:
        _check(recipe, config)
        return
    with training() as run:
        run.train(config, TOKENIZER, device)


def _list_recipes() -> None:
    from ..training.recipes import list_recipes

    table = Table(title="recipes", title_justify="left", show_header=False)
    for name, description in list_recipes().items():
        table.add_row(name, description)
    output.print(table)
    output.print("mmi finetune RECIPE --model small --check data.root=FOLDER shows what the model would be trained on",
                 highlight=False, soft_wrap=True)  # fmt: skip


def _check(recipe: str, config: TrainConfig) -> None:
    """Write the page; an error if a source gives no row."""
    from ..configuration import to_yaml
    from ..io import write_atomic
    from ..training.building import count_trained
    from .data_training import batch_statistics, find_processor, sample_source
    from .rows_page import RowsPage, SourceSample

    processor = find_processor(config.model)
    data = config.training_data
    samples = []
    for index, source in enumerate(data.sources):
        with console.status(f"reading {source.name}"):
            batches, report, problem = sample_source(data, index, processor, BATCHES)
        about = f"type {source.type}" + (", replayed" if source.replay else "")
        samples.append(SourceSample(source.name, about, batches, report, problem, batch_statistics(batches)))
    with console.status("counting parameters"):
        trained = [(part.name, part.total, part.trainable) for part in count_trained(config)]
    length = {"steps": f"{config.steps:,}"} if config.steps is not None else {"epochs": f"{config.epochs:g}"}
    facts = {"run in": config.output, **length, "learning rate": f"{config.optimizer.lr:g}"}
    page = RowsPage(recipe, facts, [], samples, trained, to_yaml(config))
    path = Path(config.output) / PAGE
    write_atomic(path, page.render(processor))
    output.print(f"page: {path}", highlight=False, soft_wrap=True)
    if failed := [sample for sample in samples if sample.problem]:
        raise UsageError(f"source '{failed[0].name}' cannot be used: {failed[0].problem}")
