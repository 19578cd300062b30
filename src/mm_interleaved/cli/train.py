"""`mmi train`: trains a model as a YAML file describes, also under torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from .errors import UsageError
from .models import check_cpu

Settings = Annotated[list[str] | None, typer.Argument(help="key=value, replaces a setting of the file.")]
ConfigFile = Annotated[Path, typer.Argument(help="YAML file of a run; see configs/.", metavar="CONFIG")]
Device = Annotated[str | None, typer.Option(help="cpu, or by default a GPU if there is one.")]


def train(config: ConfigFile, settings: Settings = None, device: Device = None) -> None:
    """Train a model, or resume an interrupted run."""
    from ..configuration import load_config
    from ..pretrained import TOKENIZER
    from ..training.config import TrainConfig

    loaded = load_config(config, TrainConfig, settings or [])
    check_cpu(device)
    with training() as run:
        run.train(loaded, TOKENIZER, device)


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
