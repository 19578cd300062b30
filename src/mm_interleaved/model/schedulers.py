"""Schedulers of diffusers that can run this model's diffusion backwards."""

from __future__ import annotations

import inspect
from typing import Any, Protocol, cast

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from .image_settings import SCHEDULERS

SCHEDULER_ADVICE = f"try {', '.join(SCHEDULERS[:-1])} or {SCHEDULERS[-1]}"
# What a scheduler must support: the noise schedule of training, and the arguments of `step` in `denoise`.
_NOISE_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
_STEP = ["model_output", "timestep", "sample"]


class NoiseScheduler(Protocol):
    """The common interface of the diffusers schedulers that `find_scheduler` accepts."""

    timesteps: Tensor
    init_noise_sigma: float | Tensor

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NoiseScheduler:
        """A scheduler with the settings of another one."""
        ...

    def set_timesteps(self, num_inference_steps: int, device: torch.device | None = None) -> None:
        """Set the timesteps."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The latents scaled for the UNet."""
        ...

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> SchedulerOutput:
        """The latents after one step."""
        ...


def find_scheduler(name: str) -> type[NoiseScheduler]:
    """The diffusers scheduler class of that name, if it can run this diffusion backwards.

    Raises:
        ValueError: diffusers has no such scheduler, or it is made for another kind of diffusion.
    """
    cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise ValueError(f"scheduler '{name}' is not a diffusers scheduler; {SCHEDULER_ADVICE}")
    takes = inspect.signature(cls.__init__).parameters
    step = list(inspect.signature(getattr(cls, "step", cls)).parameters.values())[1:]
    called = [p.name for p in step if p.name in _STEP or p.default is p.empty]
    if not (set(_NOISE_SCHEDULE) <= takes.keys() and called == _STEP):
        raise ValueError(f"scheduler '{name}' is made for another kind of diffusion; {SCHEDULER_ADVICE}")
    return cast("type[NoiseScheduler]", cls)
