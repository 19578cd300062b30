"""Epochs as a number of steps.

An epoch is one pass over the mixture, as `data.sampling` ends it. How many batches that are depends on how documents
fill rows, so the batches of the first epoch are counted before training begins. Later epochs may have a few more or
fewer, because random choices are drawn anew in each epoch; the run has the number of steps that was announced.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import TrainingArguments

from ..data import DocumentLoader
from ..io import InputError, read_json, write_json
from .config import TrainConfig

FILE = "epoch.json"  # in the folder of a run: the batches of an epoch, which a resumed run does not count again


@dataclass(frozen=True)
class Length:
    """The length of a run.

    Attributes:
        steps: number of optimizer steps.
        steps_per_epoch: steps of an epoch; None: not counted.
    """

    steps: int
    steps_per_epoch: float | None = None


def length_of_run(config: TrainConfig, loader: Any, args: TrainingArguments, console: Console) -> Length:
    """The number of steps of a run; every process must call this.

    Args:
        config: settings of the run.
        loader: loader of `config.data` of this process, without `replay`.
        args: knows the processes.
        console: shows progress.

    Raises:
        ValueError: the loader of a plug-in cannot count its batches.
    """
    if config.epochs is None:
        assert config.steps is not None  # one of the two is given
        return Length(config.steps)
    batches = float(_counted(config, loader, args, console))
    if config.replay is not None:  # an epoch is a pass over the run's own data, between which others are mixed
        batches /= 1 - config.replay.share
    per_epoch = batches / (args.world_size * config.accumulation)
    steps = max(1, math.ceil(config.epochs * per_epoch - 1e-9))
    many = "1 epoch" if config.epochs == 1 else f"{config.epochs:g} epochs"
    console.print(f"{many} of {per_epoch:,.1f} steps: {steps:,} steps")
    return Length(steps, per_epoch)


def _counted(config: TrainConfig, loader: Any, args: TrainingArguments, console: Console) -> int:
    """The batches of the first epoch of all processes together."""
    path = Path(config.output) / FILE
    key = _digest(config, args.world_size, loader.contents() if isinstance(loader, DocumentLoader) else [])
    known = torch.tensor(_known(path, key) if args.process_index == 0 else 0, device=args.device)
    shared = dist.is_available() and dist.is_initialized()
    if shared:
        dist.broadcast(known, 0)
    if known.item():
        return int(known.item())
    if not isinstance(loader, DocumentLoader):
        raise ValueError(f"'epochs' needs a loader that counts its batches, and {type(loader).__name__} cannot; "
                         "give 'steps'")  # fmt: skip
    begin = time.perf_counter()
    with console.status("counting the batches of an epoch") as shown:
        own = loader.count_batches(lambda n: shown.update(f"counting the batches of an epoch: {n:,}"))
    total = torch.tensor(own, device=args.device)
    if shared:
        dist.all_reduce(total)
    console.print(f"an epoch has {int(total):,} batches, counted in {time.perf_counter() - begin:.1f} s")
    if args.process_index == 0:
        write_json(path, {"batches": int(total), "of": key})
    return int(total)


def _digest(config: TrainConfig, processes: int, contents: list[list[int | str | None]]) -> str:
    """What the number of batches depends on."""
    data = json.dumps([dataclasses.asdict(config.training_data), processes, contents], sort_keys=True, default=str)
    return hashlib.sha256(data.encode()).hexdigest()


def _known(path: Path, key: str) -> int:
    """The number of batches that an earlier start of the run counted; 0: none."""
    try:
        found = read_json(path)
        return int(found["batches"]) if found["of"] == key else 0
    except (InputError, KeyError, TypeError, ValueError):
        return 0
