"""`mmi plan`: memory, time and disk of a training run, before it is started."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .console import console, output
from .errors import UsageError
from .options import FileChanges, LoraPreset

if TYPE_CHECKING:
    from ..model import MMInterleavedConfig
    from ..planning.plan import Plan
    from ..training.config import TrainConfig

GIB = 2**30


def plan(
    config: Annotated[str, typer.Argument(help="YAML file of a run, or a recipe of mmi finetune.", metavar="CONFIG")],
    settings: FileChanges = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs.", min=1)] = 1,
    kind: Annotated[str, typer.Option("--type", help="Kind of GPU: h200, h100, a100, a100-40, l40s, ...")] = "h200",
    per_node: Annotated[int, typer.Option(help="GPUs of a machine.", min=1)] = 8,
    images: Annotated[
        int | None, typer.Option(help="Images of a row; by default the most that the settings allow.", min=0)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="release or small: take the sizes of this model, and none of its files.")
    ] = None,
    lora: LoraPreset = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a training run needs: memory, time and disk. Needs no GPU."""
    from ..io import close_name
    from ..training.gpus import GPUS

    loaded = _read(config, model, lora, settings or [])
    if kind not in GPUS:
        raise UsageError(f"--type '{kind}' is none of {', '.join(GPUS)}", fix=close_name(kind, GPUS))
    from ..planning.plan import make_plan, suggest
    from ..planning.step import Cluster

    cluster = Cluster(GPUS[kind], gpus, min(per_node, gpus))
    try:
        with console.status("counting"):
            sizes = _model_config(loaded, model)
            found = make_plan(loaded, sizes, cluster, images)
            if not found.fits:
                found.suggestions = suggest(loaded, sizes, cluster, images)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    _show(found)


def _read(config: str, model: str | None, lora: str | None, settings: list[str]) -> TrainConfig:
    """The settings of the run. A recipe gets the model whose sizes are taken, and its files are not looked for."""
    from ..configuration import list_keys, read_overrides
    from ..training.recipes import FOLDER, find_recipe, load_recipe

    named = read_overrides(settings).get("model") or {}
    if model is not None and "init_from" not in named and "model" not in list_keys(find_recipe(config), FOLDER):
        settings = [f"model.init_from.checkpoint={model}", *settings]
    return load_recipe(config, lora=lora, overrides=settings)


def _model_config(config: TrainConfig, model: str | None) -> MMInterleavedConfig:
    """The sizes of the model."""
    from ..model import MMInterleavedConfig
    from ..model.config import PRESETS
    from ..pretrained import TOKENIZER
    from ..training.building import build_config

    if model is None:
        try:
            return build_config(config.model, TOKENIZER)
        except ValueError as error:
            raise UsageError(f"{error}. For sizes without files: --model release") from error
    if model not in PRESETS:
        raise UsageError(f"--model '{model}' is none of {', '.join(PRESETS)}")
    return MMInterleavedConfig.preset(model)


def _show(plan: Plan) -> None:
    cluster = plan.cluster
    machines = "one machine" if cluster.nodes == 1 else f"{cluster.nodes} machines"
    title = f"{cluster.gpus} x {cluster.gpu.name} on {machines}, {plan.division}"
    memory = Table(title=f"{title}: memory of a GPU at its largest moment", title_justify="left", show_header=False)
    for name, size in plan.memory.parts.items():
        memory.add_row(name, _gib(size))
    memory.add_row("all", _gib(plan.memory.total), style="bold")
    memory.add_row("available", _gib(plan.available))
    output.print(memory)
    output.print(_steps_table(plan))
    output.print(_run_table(plan))
    for line in plan.assumptions:
        output.print(f"- {line}", highlight=False)
    if not plan.fits:
        needed = f"needs {_gib(plan.memory.total)} of {_gib(plan.available)}"
        advice = f"It fits with {'; '.join(plan.suggestions)}" if plan.suggestions else (
            "Fewer rows do not help; take more or larger GPUs with fsdp, or train less of the model (freeze, adapter)"
        )  # fmt: skip
        console.print(f"[yellow]does not fit:[/] {needed}. {advice}", highlight=False)


def _steps_table(plan: Plan) -> Table:
    table = Table(title="a step, in seconds, by the source of its batches", title_justify="left")
    table.add_column("")
    for source in plan.sources:
        table.add_column(source.name, justify="right")
    rows = {
        "share of batches": [f"{s.share:.0%}" for s in plan.sources],
        "rows x tokens": [f"{s.sizes.rows} x {s.sizes.tokens}" for s in plan.sources],
        "images, of them targets": [f"{s.sizes.images}, {s.sizes.targets}" for s in plan.sources],
    }
    shown = {"language": "language model", "queries": "MMFS of text", "vision": "image encoder",
             "denoising": "denoising", "latents": "VAE", "adapter": "adapter", "optimizer": "optimizer",
             "host": "waiting for the host", "waiting": "waiting for other GPUs", "total": "total"}  # fmt: skip
    for name, title in shown.items():
        rows[title] = [f"{getattr(s.time, name):.2f}" for s in plan.sources]
    for name, values in rows.items():
        table.add_row(name, *values, style="bold" if name == "total" else None)
    return table


def _run_table(plan: Plan) -> Table:
    table = Table(title="the run", title_justify="left", show_header=False)
    table.add_row("seconds a step", f"{plan.step_seconds:.2f}")
    table.add_row("tokens a second", f"{plan.tokens / plan.step_seconds:,.0f}")
    table.add_row("images a second", f"{plan.images / plan.step_seconds:,.0f}")
    table.add_row("MFU", f"{plan.mfu:.0%}")
    if plan.days is not None and plan.steps is not None:
        table.add_row(f"{plan.steps:,} steps", _duration(plan.days))
    table.add_row("a checkpoint", f"{_gib(plan.checkpoint)}, {plan.kept} are kept")
    table.add_row("the final model", _gib(plan.final))
    return table


def _duration(days: float) -> str:
    hours = 24 * days
    return f"{days:.1f} days" if days >= 2 else f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:.1f} GiB" if gib >= 0.1 else f"{1024 * gib:.1f} MiB"
