"""`mmi train`: train a model from a YAML file; works under torchrun as well."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..configuration import ConfigError, load_config
from ..training.config import TrainConfig
from .results import UsageError

Settings = Annotated[list[str] | None, typer.Argument(help="key=value, replacing single settings of the file.")]
ConfigFile = Annotated[Path, typer.Argument(help="YAML file of a run; see configs/.", metavar="CONFIG")]
Device = Annotated[str | None, typer.Option(help="cpu, to stay there; else an accelerator if there is one.")]


def train(config: ConfigFile, settings: Settings = None, device: Device = None) -> None:
    """Train a model of documents, or go on where an interrupted run stopped."""
    loaded = load_config(config, TrainConfig, settings or [])
    from ..pretrained import FOLDER
    from ..training.run import train as run
    from ..training.trainer import TrainingError

    try:
        run(loaded, FOLDER / "tokenizer", device)
    except (TrainingError, ConfigError) as error:
        raise UsageError(str(error)) from None
    except ValueError as error:
        raise UsageError(str(error)) from error
