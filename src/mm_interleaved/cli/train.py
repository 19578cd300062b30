"""`mmi train`: trains a model as a YAML file describes, also under torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from ..launch.exits import STOPPED
from .errors import UsageError
from .memory import Force, check_memory
from .models import check_cpu
from .options import FileChanges, ProcessDevice


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of a run; see configs/.", metavar="CONFIG")],
    settings: FileChanges = None,
    force: Force = False,
    device: ProcessDevice = None,
) -> None:
    """Train a model, or resume an interrupted run."""
    from ..configuration import load_config
    from ..pretrained import TOKENIZER
    from ..training.config import TrainConfig

    loaded = load_config(config, TrainConfig, settings or [])
    check_cpu(device)
    with training() as run:
        check_memory(loaded, device, force)
        stopped = run.train(loaded, TOKENIZER, device)
    end(stopped)


def end(stopped: str | None) -> None:
    """End the program with the status of a run: 0 if it is finished, `STOPPED` if a signal stopped it.

    Under `srun --kill-on-bad-exit` the first process that ends with another status than 0 ends the others, which may
    not be through yet. So the first process alone says it there; torchrun needs it of all.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    if stopped is not None and (is_first or "TORCHELASTIC_RUN_ID" in os.environ):
        raise typer.Exit(STOPPED)


@contextmanager
def training() -> Iterator[ModuleType]:
    """The module `training.run`, for one run. Errors that the user can correct are raised as a `UsageError`."""
    from ..training import run
    from ..training.config import TrainingError

    try:
        yield run
        run.destroy_process_group()
    except (TrainingError, ValueError) as error:
        raise UsageError(str(error)) from error
