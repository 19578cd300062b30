"""How images are generated: the settings of the diffusion, checked when they are made."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal, Protocol, cast

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from pydantic import Field
from torch import Tensor

from ..validation import Count, Positive, Seed, settings
from .denoising import CacheImplementation

SCHEDULER_ADVICE = "try DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler"
# What a scheduler must understand: the noise that the model was trained with, and how `denoise` calls it.
_NOISE_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
_STEP = ["model_output", "timestep", "sample"]


class NoiseScheduler(Protocol):
    """What the diffusers schedulers that `find_scheduler` accepts have in common."""

    timesteps: Tensor
    init_noise_sigma: float | Tensor

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NoiseScheduler:
        """One with the settings of another."""
        ...

    def set_timesteps(self, num_inference_steps: int, device: torch.device | None = None) -> None:
        """Choose the timesteps."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The latents as the UNet takes them."""
        ...

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> SchedulerOutput:
        """The latents one step further."""
        ...


@settings
class ImageSettings:
    """How images are generated.

    Attributes:
        num_inference_steps: denoising steps.
        guidance_scale: strength of classifier-free guidance; at most 1: off, and half the work; None: what the model's
            configuration says (release: 7.5).
        num_candidates: images generated for each request, with seeds `seed`, `seed + 1`, ...
        seed: seed of the first candidate's noise, at least 0 and below `SEED_LIMIT`.
        scheduler: name of a diffusers scheduler class; the release samples with ancestral DDPM.
        unconditional_sees_images: whether the unconditional half of guidance sees earlier images (release: yes).
        preview_every: give a preview of the image every so many steps; 0: never.
        batch_size: images generated at a time. Images that share one generator get other noise with another value.
        cache_implementation: "static" keeps what a denoising step reads in tensors of fixed size, so that a CUDA device
            replays one captured step; "dynamic" calls the UNet step by step. "auto": static on a CUDA device, if the
            model can, else dynamic. The images are the same, but for rounding.
        compile: with "static", compile the UNet before its step is captured; takes minutes, once for every shape.
        decode_dtype: type in which the VAE computes; "bfloat16" is lossy.
    """

    num_inference_steps: Positive = 30
    guidance_scale: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    num_candidates: Positive = 1
    seed: Seed = 42
    scheduler: str = "DDPMScheduler"
    unconditional_sees_images: bool = True
    preview_every: Count = 0
    batch_size: Positive = 8
    cache_implementation: CacheImplementation = "auto"
    compile: bool = False
    decode_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        find_scheduler(self.scheduler)


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
