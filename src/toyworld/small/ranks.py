"""The processes that train together, one for each GPU, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """A process among those of a run.

    Attributes:
        device: where this process computes.
        rank: its number.
        world: how many there are.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    @classmethod
    @contextmanager
    def joined(cls, kind: str) -> Iterator[Ranks]:
        """This process with its process group, which is destroyed at the end; `kind` of device: "cuda" or "cpu"."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if kind == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        else:
            device = torch.device(kind)
        if world == 1:
            yield cls(device)
            return
        # gloo for what the processes agree on, which must not wait for a GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        try:
            yield cls(device, dist.get_rank(), world)
        finally:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, whole: int, name: str) -> int:
        """The part of `whole` that each process has.

        Raises:
            ValueError: it cannot be divided equally.
        """
        if whole % self.world:
            raise ValueError(f"{name}: {whole} cannot be divided among {self.world} processes; change one of them")
        return whole // self.world

    def average_(self, x: Tensor) -> Tensor:
        """Replace `x` by its mean over all processes."""
        if self.world > 1:
            dist.all_reduce(x)
            x /= self.world
        return x

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        return float(self.average_(torch.tensor(value, dtype=torch.float64))) * self.world

    def agree(self, answer: bool) -> bool:
        """The answer of the first process; a barrier as well."""
        if self.world == 1:
            return answer
        told = torch.tensor(answer)
        dist.broadcast(told, 0)
        return bool(told)

    def wait(self) -> None:
        """Until all processes are here."""
        self.total(0.0)
