"""An exponential moving average of the trainable weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .config import EMAConfig

FILE = "ema.safetensors"


class EMA:
    """average <- decay * average + (1 - decay) * weight, after every step from `start_step` on."""

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.live.items()}
        self._blend = get_ema_multi_avg_fn(config.decay)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after optimizer step number `step`; before `start_step` it equals the weights."""
        live, average = [p.detach() for p in self.live.values()], list(self.average.values())
        if step <= self.config.start_step:
            for kept, now in zip(average, live, strict=True):
                kept.copy_(now)
        else:
            self._blend(average, live, torch.tensor(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the model has the average as its weights, and the average is that of the weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange values in place, because FSDP gathers weights from the memory that they had when it divided them."""
        for name, parameter in self.live.items():
            now = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(now)

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint folder."""
        save_file({name: t.contiguous() for name, t in self.average.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read the average from a checkpoint folder.

        Raises:
            ValueError: the checkpoint has no average, or one of other parameters.
        """
        if not (folder / FILE).is_file():
            raise ValueError(f"'{folder}' has no {FILE}; the run that wrote it kept no average (ema.decay)")
        saved = load_file(folder / FILE)
        if set(saved) != set(self.average):
            raise ValueError(f"'{folder / FILE}' holds the average of other parameters")
        with torch.no_grad():
            for name, tensor in self.average.items():
                tensor.copy_(saved[name])
