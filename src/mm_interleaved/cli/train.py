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
    with _training() as run:
        run.train(loaded, TOKENIZER, device)


def train_vae(config: ConfigFile, settings: Settings = None, device: Device = None) -> None:
    """Train the image autoencoder of a small model."""
    from ..configuration import load_config
    from ..training.config import AutoencoderRunConfig

    loaded = load_config(config, AutoencoderRunConfig, settings or [])
    with _training() as run:
        run.train_autoencoder(loaded, device)


def train_vision(config: ConfigFile, settings: Settings = None, device: Device = None) -> None:
    """Train the visual tokenizer of a small model, before the model itself."""
    from ..configuration import load_config
    from ..pretrained import TOKENIZER
    from ..training.config import PartRunConfig

    loaded = load_config(config, PartRunConfig, settings or [])
    with _training() as run:
        run.train_vision(loaded, TOKENIZER, device)


def train_language(config: ConfigFile, settings: Settings = None, device: Device = None) -> None:
    """Train the language model of a small model on text alone, before the model itself."""
    from ..configuration import load_config
    from ..pretrained import TOKENIZER
    from ..training.config import PartRunConfig

    loaded = load_config(config, PartRunConfig, settings or [])
    with _training() as run:
        run.train_language(loaded, TOKENIZER, device)


@contextmanager
def _training() -> Iterator[ModuleType]:
    """The module of runs, for one of them, with which the program ends; what a user can mend is one message."""
    from ..training import run
    from ..training.config import TrainingError

    try:
        yield run
        run.destroy_process_group()
    except (TrainingError, ValueError) as error:
        raise UsageError(str(error)) from error
