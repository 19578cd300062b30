"""Settings of image generation, which are checked when they are made."""

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


@settings
class ImageSettings:
    """Settings of image generation.

    Attributes:
        num_inference_steps: number of denoising steps.
        guidance_scale: strength of classifier-free guidance; at most 1: off, which halves the work; None: the value of
            the model's configuration (release: 7.5).
        num_candidates: images generated for each request, with seeds `seed`, `seed + 1`, ...
        seed: seed of the first candidate's noise, at least 0 and below `SEED_LIMIT`.
        scheduler: name of a diffusers scheduler class; the release samples with ancestral DDPM.
        unconditional_sees_images: whether the unconditional half of guidance has earlier images (release: yes).
        preview_every: number of steps between previews of the image; 0: no previews.
        batch_size: number of images generated together. It changes the noise of images that share one generator.
        cache_implementation: "static" keeps the inputs of a denoising step in fixed tensors, so that a CUDA device
            replays one captured step; "dynamic" calls the UNet. "auto": static on a CUDA device if the model can be
            captured, else dynamic. The images are the same up to rounding.
        compile: with "static", compile the UNet before its step is captured; takes minutes, once for every shape.
        decode_dtype: type of the VAE's computation; "bfloat16" is lossy.
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
