"""How images are generated: the settings of the diffusion, checked when they are made."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Literal

import diffusers
from diffusers import SchedulerMixin

from .denoising import CacheImplementation

SEED_LIMIT = 2**63  # torch takes seeds below 2**64; the rest is room for `seed + candidate + turn`
SCHEDULER_ADVICE = "try DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler"
# What a scheduler must understand: the noise that the model was trained with, and how `denoise` calls it.
_NOISE_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
_STEP = ["model_output", "timestep", "sample"]


@dataclass
class ImageSettings:
    """How pictures are drawn.

    Attributes:
        num_inference_steps: denoising steps.
        guidance_scale: strength of classifier-free guidance; at most 1: off, and half the work; None: what the model's
            configuration says (release: 7.5).
        num_candidates: pictures drawn for each request, with seeds `seed`, `seed + 1`, ...
        seed: seed of the first candidate's noise, at least 0 and below `SEED_LIMIT`.
        scheduler: name of a diffusers scheduler class; the release samples with ancestral DDPM.
        unconditional_sees_images: whether the unconditional half of guidance sees earlier pictures (release: yes).
        preview_every: give a preview of the picture every so many steps; 0: never.
        batch_size: pictures drawn at a time. Pictures that share one generator get other noise with another value.
        cache_implementation: "static" keeps what a denoising step reads in tensors of fixed size, so that a CUDA device
            replays one recorded step; "dynamic" calls the UNet step by step. "auto": static on a CUDA device, if the
            model can, else dynamic. The pictures are the same, but for rounding.
        compile: with "static", compile the UNet before its step is recorded; takes minutes, once for every shape.
        decode_dtype: type in which the VAE computes; "bfloat16" is lossy.
    """

    num_inference_steps: int = 30
    guidance_scale: float | None = None
    num_candidates: int = 1
    seed: int = 42
    scheduler: str = "DDPMScheduler"
    unconditional_sees_images: bool = True
    preview_every: int = 0
    batch_size: int = 8
    cache_implementation: CacheImplementation = "auto"
    compile: bool = False
    decode_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name, kinds in (("cache_implementation", ("auto", "static", "dynamic")),
                            ("decode_dtype", ("float32", "bfloat16"))):  # fmt: skip
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} must be one of {', '.join(kinds)}, not '{getattr(self, name)}'")
        for name in ("num_inference_steps", "num_candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.preview_every < 0:
            raise ValueError(f"preview_every must not be negative, but is {self.preview_every}")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, not {self.guidance_scale}")
        check_seed(self.seed)
        find_scheduler(self.scheduler)


def check_seed(seed: int) -> None:
    """Refuse a seed that no generator takes.

    Raises:
        ValueError: it is negative, or not below `SEED_LIMIT`.
    """
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"seed must be at least 0 and less than 2**63, not {str(seed)[:40]}")


def find_scheduler(name: str) -> type[SchedulerMixin]:
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
    return cls
