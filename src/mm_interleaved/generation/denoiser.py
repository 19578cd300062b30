"""Denoising of images that start at different times: images with settings that fit share the calls of the UNet.

Each image has a scheduler, a generator and a timestep of its own, so what is generated beside it changes nothing but
rounding. The oldest images go first: those that do not fit beside them wait, since all of them at once would be done
later on average. The reference implementation is `ImageDecoder.denoise` for one image.

Axes: L condition tokens, C latent channels, I earlier images, R slots for earlier images.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional as F

from ..model.denoising import borrow
from ..model.image_decoder import DenoisingStep, ImageDecoder, Predict
from ..model.image_settings import ImageSettings
from ..model.mmfs import VisibleImages
from ..model.schedulers import NoiseScheduler
from ..model.unet import EarlierImages
from ..ops import promote

MOST_TOGETHER = 8  # images of one call of the UNet; twice as many with guidance


@dataclass(eq=False)
class ImageJob:
    """An image that is being generated.

    Attributes:
        settings: its settings, settled.
        conditions: [1, L, cross_attention_dim].
        earlier: its earlier images, with values.
        scheduler: its scheduler, which may keep earlier predictions.
        generator: random numbers of the first noise and of steps.
        latents: [1, C, side, side].
        index: number of steps done.
        last: what the last step gave; None: there was none.
    """

    settings: ImageSettings
    conditions: Tensor
    earlier: EarlierImages
    scheduler: NoiseScheduler
    generator: torch.Generator
    latents: Tensor
    index: int = 0
    last: DenoisingStep | None = None

    @property
    def is_done(self) -> bool:
        """Whether all steps are done."""
        return self.index == len(self.scheduler.timesteps)

    @property
    def timestep(self) -> Tensor:
        """Diffusion time of the next step, a scalar."""
        return self.scheduler.timesteps[self.index]

    @property
    def scaled(self) -> Tensor:
        """The latents as the UNet takes them in the next step."""
        return self.scheduler.scale_model_input(self.latents, self.timestep)

    @property
    def guidance(self) -> float:
        """Strength of the classifier-free guidance; at most 1: none."""
        assert self.settings.guidance_scale is not None  # the settings are settled
        return self.settings.guidance_scale

    @property
    def kind(self) -> Hashable:
        """Images with the same kind can share calls of the UNet."""
        settings = self.settings
        return (self.guidance > 1, settings.unconditional_sees_images, settings.cache_implementation, settings.compile)


@dataclass
class _Call:
    """A call of the UNet for some images, with everything that their steps do not change.

    Attributes:
        jobs: the images.
        places: images of the call; those behind `jobs` repeat the last one.
        guided: whether the first half of the call is unconditional.
        predict: from latents and timesteps of all of the call to the prediction.
        lease: frees what the call holds.
    """

    jobs: list[ImageJob]
    places: int
    guided: bool
    predict: Predict
    lease: ExitStack


class Denoiser:
    """Denoises images together that may start and end at any step.

    Args:
        decoder: the image decoder.
        most_together: most images in one call of the UNet.
    """

    def __init__(self, decoder: ImageDecoder, most_together: int = MOST_TOGETHER) -> None:
        self.decoder, self.most_together = decoder, most_together
        self.jobs: list[ImageJob] = []
        self._call: _Call | None = None  # for the jobs as they are; None: to be made

    @torch.no_grad()
    def add(
        self, conditions: Tensor, earlier: EarlierImages, settings: ImageSettings, generator: torch.Generator
    ) -> ImageJob:
        """Start an image.

        Args:
            conditions: [1, L, cross_attention_dim] from the resampler.
            earlier: its earlier images.
            settings: its settings, settled.
            generator: random numbers of its noise.

        Raises:
            ValueError: images cannot be generated with these settings.
        """
        scheduler = self.decoder.sampler(settings)
        shape, work = self.decoder.latent_shape(1), promote(self.decoder.dtype)
        latents = randn_tensor(shape, [generator], conditions.device, work) * scheduler.init_noise_sigma
        earlier = self.decoder.unet.prepare(earlier)
        job = ImageJob(settings, conditions, earlier, scheduler, generator, latents)
        self.jobs.append(job)
        if self._call is None or len(self._call.jobs) < self.most_together:
            self._forget_call()
        return job

    def remove(self, job: ImageJob) -> None:
        """Stop an image; the others go on."""
        self.jobs.remove(job)
        self._forget_call()

    def clear(self) -> None:
        """Stop all images."""
        self.jobs = []
        self._forget_call()

    @torch.no_grad()
    def step(self) -> Iterator[ImageJob]:
        """One denoising step of the oldest images; yields each with its `last` step. Those that are done leave."""
        if not self.jobs:
            return
        if self._call is None:
            together = [job for job in self.jobs if job.kind == self.jobs[0].kind]
            self._call = self._make_call(together[: self.most_together])
        call = self._call
        for job, prediction in zip(call.jobs, self._predict(call, self.decoder.dtype).split(1), strict=True):
            self._advance(job, prediction)
        if any(job.is_done for job in call.jobs):
            self.jobs = [job for job in self.jobs if not job.is_done]
            self._forget_call()
        yield from call.jobs

    def _forget_call(self) -> None:
        if self._call is not None:
            self._call.lease.close()
        self._call = None

    def _make_call(self, jobs: list[ImageJob]) -> _Call:
        """A call for these images; a captured one has a power of two of places, since every size is captured anew."""
        settings, device, decoder = jobs[0].settings, jobs[0].conditions.device, self.decoder
        static, guided = decoder.is_static(settings, device), jobs[0].guidance > 1
        places = _power_of_two(len(jobs)) if static else len(jobs)
        shown = [*jobs, *jobs[-1:] * (places - len(jobs))]
        conditions = torch.cat([job.conditions for job in shown])
        earlier = _joined([job.earlier for job in shown], padded=static)
        if guided:
            negative = decoder.negative_prompt().to(conditions).expand(len(conditions), -1, -1)
            conditions = torch.cat([negative, conditions])
            earlier = earlier.for_guidance(settings.unconditional_sees_images)
        lease = ExitStack()
        if static:
            latents = torch.zeros(decoder.latent_shape(len(conditions)), dtype=decoder.dtype, device=device)
            times = torch.zeros(len(conditions), dtype=torch.long, device=device)
            graphed = lease.enter_context(
                borrow(decoder.unet, latents, times, conditions, earlier, compiled=settings.compile)
            )
            graphed.load(conditions, earlier)
            return _Call(jobs, places, guided, graphed, lease)
        call = partial(decoder.unet, conditions=conditions, earlier=earlier, derived=decoder.unet.derive(),
                       text=decoder.unet.prepare_text(conditions))  # fmt: skip
        return _Call(jobs, places, guided, call, lease)

    @staticmethod
    def _predict(call: _Call, dtype: torch.dtype) -> Tensor:
        """The noise prediction [B, C, side, side] of each image after guidance."""
        jobs, spare = call.jobs, call.places - len(call.jobs)
        times = [job.timestep for job in jobs]
        scaled = [job.scaled for job in jobs]
        latents = torch.cat([*scaled, *scaled[-1:] * spare]).to(dtype)
        steps = torch.stack([*times, *times[-1:] * spare]).to(latents.device)
        if not call.guided:
            return call.predict(latents, steps)[: len(jobs)].to(promote(dtype))
        both = call.predict(torch.cat([latents, latents]), torch.cat([steps, steps]))
        without, with_context = (half[: len(jobs)] for half in both.chunk(2))
        scales = torch.tensor([job.guidance for job in jobs]).to(both)[:, None, None, None]
        return (without + scales * (with_context - without)).to(promote(dtype))

    def _advance(self, job: ImageJob, prediction: Tensor) -> None:
        """One step of an image's scheduler."""
        timestep, scaled, total = job.timestep, job.scaled, len(job.scheduler.timesteps)
        number, every = job.index + 1, job.settings.preview_every
        due = bool(every) and number % every == 0 and number < total
        preview = self.decoder.decode(self.decoder.clean(scaled, prediction, timestep)) if due else None
        takes_generator = "generator" in inspect.signature(job.scheduler.step).parameters
        extra = {"generator": [job.generator]} if takes_generator else {}
        job.latents = job.scheduler.step(prediction, timestep, job.latents, **extra).prev_sample
        job.index = number
        job.last = DenoisingStep(number, total, int(timestep), job.latents, prediction, preview)


def _power_of_two(count: int) -> int:
    """The next power of two from `count` on; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


def _joined(parts: Sequence[EarlierImages], padded: bool) -> EarlierImages:
    """The earlier images of several images as those of one batch; `padded` to few different sizes."""
    width, offset, numbers = max(part.visible.images.shape[1] for part in parts), 0, []
    width = _power_of_two(width) if padded else width
    for part in parts:
        images = part.visible.images
        moved = torch.where(images >= 0, images + offset, -1)
        numbers.append(F.pad(moved, (0, width - images.shape[1]), value=-1))
        offset += len(part.features)
    more = max(len(parts) * width - offset, 0) if padded else 0

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return F.pad(torch.cat(list(tensors)), (*(0, 0) * (tensors[0].dim() - 1), 0, more))

    assert all(part.values is not None for part in parts)
    values = [join(same) for same in zip(*(part.values or [] for part in parts), strict=True)]
    return replace(
        parts[0], features=join([part.features for part in parts]), normed=join([part.normed for part in parts]),
        visible=VisibleImages.build(torch.cat(numbers), offset + more), values=values,
    )  # fmt: skip
