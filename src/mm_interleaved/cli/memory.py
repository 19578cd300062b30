"""The memory that a training run needs, compared with that of the GPU, before it starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..launch import count_processes, join_processes
from .console import console
from .errors import UsageError

if TYPE_CHECKING:
    from ..training.config import TrainConfig
    from ..training.memory import BatchSizes, MemoryEstimate

GIB = 2**30
MOST = 1.3  # times the memory of the GPU: a run that seems to need more is not started
ADVICE = ("Make the batches smaller (data.batch_size, data.max_length), train an adapter (adapter.preset=llm), set "
          "gradient_checkpointing=true, or start with --force")  # fmt: skip

Force = Annotated[bool, typer.Option("--force", help="Start although the memory seems too small.")]


def check_memory(config: TrainConfig, device: str | None, force: bool) -> None:
    """Warn if a run seems to need more memory than a GPU has; only on the first process, and not where a run goes on.

    Raises:
        UsageError: it seems to need more than `MOST` times as much, and `force` is False.
    """
    from ..training.checkpoints import list_checkpoints

    join_processes()
    capacity = gpu_memory(device)
    if capacity is None or force or os.environ.get("RANK", "0") != "0" or list_checkpoints(Path(config.output)):
        return
    memory = estimate_memory(config)
    if warning := compare_memory(memory.total, capacity):
        if memory.total > MOST * capacity:
            raise UsageError(f"{warning} {memory}. {ADVICE}")
        console.print(f"[yellow]{warning}[/] {memory}", highlight=False, soft_wrap=True)


def compare_memory(needed: int, capacity: int) -> str:
    """A warning if more memory is needed than there is; else ""."""
    if needed <= capacity:
        return ""
    return f"The run needs about {needed / GIB:.1f} GiB on one GPU, which has {capacity / GIB:.1f} GiB."


def gpu_memory(device: str | None) -> int | None:
    """Bytes of the GPU; None: the run is on the CPU."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def estimate_memory(config: TrainConfig, sizes: BatchSizes | None = None) -> MemoryEstimate:
    """The memory of one process of a run.

    Args:
        config: settings of the run.
        sizes: sizes of a batch; None: the largest that the settings allow.
    """
    from ..pretrained import TOKENIZER
    from ..training.building import build_config
    from ..training.memory import estimate

    with console.status("estimating the memory"):
        return estimate(config, build_config(config.model, TOKENIZER), count_processes(), sizes)
