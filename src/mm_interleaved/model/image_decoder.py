"""The image decoder generates an image from its context.

    context ──► resampler ──► conditions ──► UNet (with earlier images through MMFS) ──► latents ──► VAE ──► image

Training predicts the noise in the latents of the true image (DDPM, arXiv 2006.11239, eq. 14). Sampling runs the
diffusion backwards with classifier-free guidance (arXiv 2207.12598). Its unconditional half has a learned
`negative_prompt` as conditions, and the same earlier images. See docs/model.md, "Image decoder".

Axes: B batch of images, L tokens, C channels, h and w height and width.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import cast

import torch
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import channels_last, promote
from .config import ImageDecoderConfig
from .denoising import borrow
from .diffusion_blocks import VAE
from .image_settings import ImageSettings
from .mmfs import why_mmfs_waits
from .resampler import Resampler
from .schedulers import SCHEDULER_ADVICE, NoiseScheduler, find_scheduler
from .unet import DerivedWeights, EarlierImages, MMFSUNet
from .weights import why_not_captured

Predict = Callable[[Tensor, Tensor], Tensor]  # (latents, timestep) to the predicted noise
Generators = torch.Generator | Sequence[torch.Generator]  # one for all images of a call, or one per image

log = logging.getLogger(__name__)


@dataclass
class NoiseSamples:
    """The random numbers of one training step of the image decoder.

    Attributes:
        unconditional: [B] uniform in [0, 1); below `unconditional_probability` an image loses its context.
        posterior: [B, latent channels, side, side] normal, for the VAE's posterior.
        noise: [B, latent channels, side, side] normal, the target of the UNet.
        timesteps: [B] integers in [0, num_train_timesteps).
    """

    unconditional: Tensor
    posterior: Tensor
    noise: Tensor
    timesteps: Tensor

    def to(self, device: torch.device) -> NoiseSamples:
        """The same samples on another device."""
        return NoiseSamples(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def divisor(count: Tensor | float, device: torch.device) -> Tensor:
    """A count to divide a loss by: 1 where nothing was counted, so that a loss without items is 0."""
    count = torch.as_tensor(count, device=device)
    return torch.where(count > 0, count, 1)


@dataclass
class DenoisingStep:
    """State after one denoising step.

    Attributes:
        index, total: number of the step from 1, and number of steps.
        timestep: diffusion time of the step.
        latents: [B, latent channels, side, side] after the step.
        prediction: the noise prediction of the step, after guidance.
        preview: [B, 3, image_size, image_size] in [0, 1], or None when no preview was due.
    """

    index: int
    total: int
    timestep: int
    latents: Tensor
    prediction: Tensor
    preview: Tensor | None = None


class LearnedTokens(nn.Module):
    """A learned tensor of tokens. It is a module, so that offloading works: its weight is loaded when it is called."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape))

    def reset_parameters(self) -> None:
        """All zero; a model made from base components overwrites it."""
        nn.init.zeros_(self.weight)

    def forward(self) -> Tensor:
        """The tokens."""
        return self.weight


class ImageDecoder(nn.Module):
    """Resampler, UNet and VAE with the training loss and the sampling loop."""

    def __init__(self, config: ImageDecoderConfig, context_size: int, feature_size: int) -> None:
        super().__init__()
        self.config = config
        self.resampler = Resampler(config.resampler, context_size)
        self.negative_prompt = LearnedTokens(1, config.resampler.num_queries, config.resampler.hidden_size)
        self.unet = MMFSUNet(config, feature_size)
        self.vae = VAE(**config.vae)

    @cached_property
    def scheduler(self) -> DDPMScheduler:
        """The noise schedule. Made on first use, because a model may be constructed on the meta device."""
        return DDPMScheduler(**self.config.scheduler)

    def sampler(self, settings: ImageSettings, device: torch.device | None = None) -> NoiseScheduler:
        """The scheduler of `settings` for this model's noise schedule, with timesteps set.

        Raises:
            ValueError: it does not support that many steps, or this noise schedule.
        """
        trained = self.scheduler.config["num_train_timesteps"]
        too_many = (f"{settings.scheduler} does not support num_inference_steps={settings.num_inference_steps}; "
                    f"the model has {trained}, take fewer")  # fmt: skip
        if settings.num_inference_steps > trained:
            raise ValueError(too_many)
        try:
            scheduler = find_scheduler(settings.scheduler).from_config(self.scheduler.config)
            scheduler.set_timesteps(settings.num_inference_steps, device=device)
        except (ValueError, TypeError, LookupError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"scheduler '{settings.scheduler}' cannot be used with num_inference_steps="
                             f"{settings.num_inference_steps}: {error}") from None  # fmt: skip
        if not (hasattr(scheduler, "init_noise_sigma") and hasattr(scheduler, "scale_model_input")):
            raise ValueError(
                f"scheduler '{settings.scheduler}' is made for another kind of diffusion; {SCHEDULER_ADVICE}"
            )
        times = scheduler.timesteps
        falls = len(times) == 1 or times[0] > times[-1]
        if times.max() >= trained or not falls:
            raise ValueError(too_many)
        return scheduler

    def settled(self, settings: ImageSettings) -> ImageSettings:
        """`settings` with the model's defaults for values that are None."""
        if settings.guidance_scale is not None:
            return settings
        return replace(settings, guidance_scale=self.config.guidance_scale)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the UNet and its conditions."""
        return self.unet.conv_in.weight.dtype

    def latent_shape(self, num_images: int) -> tuple[int, int, int, int]:
        """Shape of the latents of `num_images` images."""
        side = self.config.latent_size
        return (num_images, self.config.vae["latent_channels"], side, side)

    def sample_noise(self, num_images: int, generator: torch.Generator | None = None) -> NoiseSamples:
        """Noise samples for one training step, in the release's order, on the generator's device."""
        device = generator.device if generator is not None else None
        shape = self.latent_shape(num_images)
        unconditional = torch.rand(num_images, generator=generator, device=device)
        size = self.config.vae_batch_size
        posterior = [
            torch.randn(min(size, num_images - i), *shape[1:], generator=generator, device=device)
            for i in range(0, num_images, size)
        ]
        noise = torch.randn(shape, generator=generator, device=device)
        last = self.config.scheduler["num_train_timesteps"]
        timesteps = torch.randint(0, last, (num_images,), generator=generator, device=device)
        return NoiseSamples(unconditional, torch.cat(posterior) if posterior else noise, noise, timesteps)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents of `images` [B, 3, size, size] in [0, 1], sampled from the posterior with `noise`.

        `noise` may have a multiple of B entries: all images are sampled once, then all again; the VAE runs once.
        """
        dtype, repeats = self.vae.dtype, len(noise) // max(len(images), 1)
        means, deviations = [], []
        with torch.autocast(images.device.type, enabled=False):  # the VAE computes in its own type
            for batch in images.split(self.config.vae_batch_size):
                posterior = self.vae.encode(channels_last((2 * batch - 1).to(dtype))).latent_dist
                means.append(posterior.mean)
                deviations.append(posterior.std)
            mean, deviation = (torch.cat(x).repeat(repeats, 1, 1, 1) for x in (means, deviations))
            return (mean + deviation * noise.to(dtype)) * self.vae.config["scaling_factor"]

    @torch.no_grad()
    def decode(self, latents: Tensor, half: bool = False) -> Tensor:
        """Images [B, 3, size, size] in [0, 1], float32, from scaled latents; `half` computes in bfloat16."""
        dtype = self.vae.dtype
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=half):
            scaled = channels_last((latents / self.vae.config["scaling_factor"]).to(dtype))
            parts = [self.vae.decode(part).sample.to(dtype) for part in scaled.split(self.config.vae_batch_size)]
        return (torch.cat(parts).to(promote(dtype)) / 2 + 0.5).clamp(0, 1)

    def loss(
        self,
        context: Tensor,
        context_mask: Tensor,
        earlier: EarlierImages,
        images: Tensor,
        noise_samples: NoiseSamples,
        image_loss_mask: Tensor | None = None,
        normalize: bool = False,
        count: Tensor | float | None = None,
    ) -> Tensor:
        """Mean squared error of the predicted noise.

        Args:
            context: [B, L, context width], projected, with positions.
            context_mask: [B, L]; an image with at most two context tokens (`<s>`, SOI) does not count.
            earlier: the earlier images of each.
            images: [B, 3, image_size, image_size] in [0, 1].
            noise_samples: the random numbers, for all images once or several times over; `earlier` likewise.
            image_loss_mask: [B] weights; None: all 1.
            normalize: divide by the images that count; else by all of them, as the release does.
            count: number of images to divide by instead.

        Returns:
            A scalar in float32.
        """
        latents = self.encode(images, noise_samples.posterior).to(self.dtype)
        noise = noise_samples.noise.to(latents)
        repeats = len(noise) // len(images)
        conditions = self.resampler(context, context_mask).repeat(repeats, 1, 1)
        dropped = noise_samples.unconditional < self.config.unconditional_probability
        conditions = torch.where(dropped[:, None, None], self.negative_prompt(), conditions)
        timesteps = cast("torch.IntTensor", noise_samples.timesteps)  # diffusers' annotation for integers
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, conditions, earlier)
        target = noise
        if self.scheduler.config["prediction_type"] == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        work = promote(self.dtype)
        error = F.mse_loss(prediction.to(work), target.to(work), reduction="none").mean((1, 2, 3))
        weight = (context_mask.sum(1) > 2).to(work)
        if image_loss_mask is not None:
            weight = weight * image_loss_mask
        weight = weight.repeat(repeats)
        if count is not None:
            return (error * weight).sum() / (repeats * divisor(count, error.device))
        return (error * weight).sum() / (weight.sum().clamp(min=1) if normalize else len(weight))

    @torch.no_grad()
    def denoise(
        self, conditions: Tensor, earlier: EarlierImages, settings: ImageSettings, generators: Generators
    ) -> Iterator[DenoisingStep]:
        """Run the diffusion backwards, one step at a time.

        Args:
            conditions: [B, L, cross_attention_dim] from `resampler`.
            earlier: the earlier images, one group for each image generated.
            settings: steps, guidance, scheduler.
            generators: source of the initial noise and of the noise of steps; one for all images, or one per image.

        Raises:
            ValueError: the scheduler cannot be used with these settings; see `sampler`.
        """
        scheduler = self.sampler(settings)  # its timesteps stay on the CPU, so that no step synchronises to read them
        generators = list(generators) if isinstance(generators, Sequence) else generators
        extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        work, total = promote(self.dtype), len(scheduler.timesteps)
        latents = randn_tensor(self.latent_shape(len(conditions)), generators, conditions.device, work)
        latents = latents * scheduler.init_noise_sigma
        with self._predictor(conditions, earlier, settings, scheduler.timesteps[0]) as predict:
            for index, timestep in enumerate(scheduler.timesteps, 1):
                scaled = scheduler.scale_model_input(latents, timestep)
                prediction = predict(scaled.to(self.dtype), timestep).to(work)
                due = settings.preview_every and index % settings.preview_every == 0 and index < total
                preview = self.decode(self.clean(scaled, prediction, timestep)) if due else None
                latents = scheduler.step(prediction, timestep, latents, **extra).prev_sample
                yield DenoisingStep(index, total, int(timestep), latents, prediction, preview)

    @contextmanager
    def _predictor(
        self, conditions: Tensor, earlier: EarlierImages, settings: ImageSettings, timestep: Tensor
    ) -> Iterator[Predict]:
        """A function that predicts the noise after guidance; everything that no step changes is computed before."""
        scale = self.settled(settings).guidance_scale
        assert scale is not None  # `settled` has replaced None
        guided = scale > 1
        if guided:
            negative = self.negative_prompt().to(conditions).expand(len(conditions), -1, -1)
            conditions = torch.cat([negative, conditions])
            earlier = earlier.for_guidance(settings.unconditional_sees_images)
        earlier = self.unet.prepare(earlier)
        if not self.is_static(settings, conditions.device):
            call = partial(self._call, conditions=conditions, earlier=earlier, derived=self.unet.derive())
            yield self._guided(call, scale) if guided else call
            return
        latents = torch.zeros(self.latent_shape(len(conditions)), dtype=self.dtype, device=conditions.device)
        leased = borrow(self.unet, latents, timestep, conditions, earlier, compiled=settings.compile)
        with leased as graphed:
            graphed.load(conditions, earlier)
            yield self._guided(graphed, scale) if guided else graphed

    def _call(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditions: Tensor,
        earlier: EarlierImages,
        derived: list[DerivedWeights],
    ) -> Tensor:
        return self.unet(latents, timestep, conditions, earlier, derived=derived)

    def is_static(self, settings: ImageSettings, device: torch.device) -> bool:
        """Whether steps go through a `GraphedUNet`.

        Raises:
            ValueError: `settings` ask for it, but the model cannot be captured.
        """
        wanted = settings.cache_implementation
        if wanted == "dynamic" or (wanted == "auto" and device.type != "cuda"):
            return False
        reason = why_not_captured(self.unet)
        if reason is None and device.type == "cuda":
            reason = why_mmfs_waits((s.mmfs for s in self.unet.synchronizers), self.dtype)
        if reason is not None and wanted == "static":
            raise ValueError(f"cache_implementation='static' is not possible for this model: {reason}; take 'dynamic'")
        if reason is not None:
            log.warning("calling the UNet in each denoising step, which is slower: %s", reason)
        return reason is None

    @staticmethod
    def _guided(call: Predict, scale: float) -> Predict:
        """`call` with classifier-free guidance; the first half of its conditions is unconditional."""

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            without, with_context = call(torch.cat([latents, latents]), timestep).chunk(2)
            return without + scale * (with_context - without)

        return predict

    def clean(self, latents: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """The latents without the predicted noise (DDPM eq. 15), for previews."""
        alpha = self.scheduler.alphas_cumprod.to(latents.device)[timestep.long().cpu()].to(latents)
        if self.scheduler.config["prediction_type"] == "v_prediction":
            return alpha.sqrt() * latents - (1 - alpha).sqrt() * prediction
        return (latents - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
