"""Settings of image generation. Importing them imports neither PyTorch nor diffusers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..validation import Count, Positive, Seed, settings

CacheImplementation = Literal["auto", "static", "dynamic"]
# Schedulers of diffusers that are known to fit; others are looked up.
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


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
        if self.scheduler not in SCHEDULERS:
            from .schedulers import find_scheduler  # diffusers takes seconds to import

            find_scheduler(self.scheduler)
