"""The measurements of a training run between two log lines."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.loader import WORK
from .flops import StepCost
from .pipeline import BatchStats


@dataclass
class Window:
    """Sums since the last log line. Losses stay on the device until then, so that steps do not synchronise.

    Attributes:
        device: device of the losses.
        sums: the sum of every named loss.
        counts: the number of added values of every named loss.
        losses: the loss of every batch, to find one that is not finite.
        begin: start time of the window.
        saving: seconds that the steps waited for checkpoints.
    """

    device: torch.device
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    begin: float = field(default_factory=time.perf_counter)
    saving: float = 0.0

    def add(self, loss: Tensor, parts: dict[str, Tensor | None], items: dict[str, float] | None = None) -> None:
        """Add the loss of one batch and its parts.

        Args:
            loss: the loss, which is checked.
            parts: its parts by name; None: the batch has none.
            items: the number of items that a part is the sum over, by its name; a part without a number is a mean over
                the batch, and all batches have equal weight.
        """
        self.losses.append(loss.detach())
        for name, value in parts.items():
            if value is None:
                value, count = torch.zeros((), device=self.device), 0
            else:
                value, count = value.detach().float(), (items or {}).get(name, 1)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + count

    def first_bad(self) -> int | None:
        """The first loss that is NaN or infinite, as a number of batches before the newest; None: there is none."""
        if not self.losses:
            return None
        bad = (~torch.isfinite(torch.stack(self.losses))).nonzero()[:, 0].tolist()
        return len(self.losses) - bad[0] if bad else None

    def close(self, stats: BatchStats, cost: StepCost | None, peak: float | None) -> dict[str, float]:
        """The means over the window and all ranks, and the total speeds of all ranks."""
        seconds = time.perf_counter() - self.begin
        names = sorted(self.sums)
        host = [float(self.counts[n]) for n in names]
        host += [stats.tokens, stats.images, stats.noise_samples, stats.places, stats.wait, self.saving]
        host += [stats.work.get(name, 0.0) for name in WORK]
        sums = [self.sums[n].double() for n in names]
        row = torch.cat([torch.stack(sums), torch.tensor(host, device=self.device).double()]) if sums else None
        if row is None:
            return {}
        ranks = 1
        if dist.is_available() and dist.is_initialized():
            ranks = dist.get_world_size()
            dist.all_reduce(row)
        values = row.tolist()
        n = len(names)
        found = {name: values[i] / values[n + i] for i, name in enumerate(names) if values[n + i]}
        tokens, images, noise_samples, places, wait, saving, *work = values[2 * n :]
        found |= {
            "tokens_per_second": tokens / seconds,
            "images_per_second": images / seconds,
            "data_wait_share": wait / ranks / seconds,
        }
        if any(work):
            found |= {f"loader_{name}_share": value / ranks / seconds for name, value in zip(WORK, work, strict=True)}
        if saving:
            found["save_share"] = saving / ranks / seconds
        if places:
            found["padding_share"] = 1 - tokens / places
        if cost is not None and peak is not None:
            found["mfu"] = cost.of(tokens, images, noise_samples) / seconds / (peak * ranks)
        if self.device.type == "cuda":
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return found
