"""`mmi train`: train a model from a YAML file; works under torchrun as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from .errors import UsageError

Settings = Annotated[list[str] | None, typer.Argument(help="key=value, replacing single settings of the file.")]
ConfigFile = Annotated[Path, typer.Argument(help="YAML file of a run; see configs/.", metavar="CONFIG")]
Device = Annotated[str | None, typer.Option(help="cpu, to stay there; else an accelerator if there is one.")]


def train(config: ConfigFile, settings: Settings = None, device: Device = None) -> None:
    """Train a model of documents, or go on where an interrupted run stopped."""
    from ..configuration import load_config
    from ..pretrained import TOKENIZER
    from ..training.config import TrainConfig

    loaded = load_config(config, TrainConfig, settings or [])
    with training() as run:
        run.train(loaded, TOKENIZER, device)


@contextmanager
def training() -> Iterator[ModuleType]:
    """The module of runs, for one of them, with which the program ends; what a user can mend is one message."""
    from ..training import run
    from ..training.config import TrainingError

    try:
        yield run
        run.destroy_process_group()
    except (TrainingError, ValueError) as error:
        raise UsageError(str(error)) from error
