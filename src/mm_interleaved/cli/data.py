"""`mmi data`: checks the data of training and of tasks, converts official files, and lists few-shot examples."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from ..io import close_name, sentences
from .data_tasks import neighbours, prepare
from .errors import UsageError

data = typer.Typer(no_args_is_help=True, help="Check the data of training and of tasks; convert official files.")


@data.command()
def check(
    what: Annotated[
        str, typer.Argument(help="The YAML file of a training run or of an evaluation, or the name of a task.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value; for a task its settings: root=DIR phase=test limit=100.")
    ] = None,
    batches: Annotated[int, typer.Option(help="Training: batches to read of each source.", min=1)] = 8,
    seconds: Annotated[float, typer.Option(help="Training: how long to measure the speed; 0: do not.", min=0)] = 10.0,
    sheet: Annotated[Path, typer.Option(help="Training: where to write the contact sheet.")] = Path("data.png"),
    rows: Annotated[int, typer.Option(help="Training: rows of each source on it, from other batches.", min=1)] = 3,
) -> None:
    """Check data before a run.

    For training, reads a sample of every source, reports accepted and rejected records and the speed, and writes an
    image of some rows. For tasks, also those that a training run evaluates, reads all annotations and reports which
    files are missing or damaged and where to get them.
    """
    from ..configuration import load_config, make_config, read_settings
    from ..evaluation import EvaluateConfig
    from ..tasks import TASKS, TaskConfig
    from ..training.config import TrainConfig
    from .data_tasks import ROOT, check_tasks
    from .data_training import check_training

    overrides = overrides or []
    if what in TASKS:
        check_tasks([make_config({"task": what, "root": ROOT}, TaskConfig, overrides, f"task '{what}'")])
        return
    if Path(what).suffix not in (".yaml", ".yml") and not Path(what).exists():
        raise UsageError(f"'{what}' is neither a file nor a task: {TASKS.unknown(what)}")
    found = read_settings(what, overrides)
    if "tasks" in found and "data" not in found:
        check_tasks(load_config(what, EvaluateConfig, overrides).chosen())
    elif "tasks" not in found and "data" not in found:
        known = {f.name for schema in (TrainConfig, EvaluateConfig) for f in fields(schema)}
        unknown = [f"unknown key '{key}'. {close_name(key, known)}" for key in found if key not in known]
        raise UsageError("has neither 'data', as files of mmi train have, nor 'tasks', as those of mmi evaluate have",
                         what, sentences(*unknown[:1]))  # fmt: skip
    elif isinstance(found.get("data"), dict) and "sources" not in found["data"]:
        keys = ", ".join(found["data"]) or "nothing"
        raise UsageError(f"{what}: 'data' has no 'sources', only {keys}. This command checks files of mmi train "
                         "and mmi evaluate")  # fmt: skip
    else:
        check_training(Path(what), overrides, batches, seconds, sheet, rows)


data.command()(prepare)
data.command()(neighbours)
