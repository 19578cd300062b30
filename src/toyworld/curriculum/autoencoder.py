"""The image autoencoder of a small model: diffusers' AutoencoderKL, trained on drawn or given images.

    loss = L1 + edges + frequency + kl [+ adversarial], each with its weight

`edges` compares horizontal and vertical differences at several scales, which keeps thin lines and letters sharp where
L1 alone blurs them; `frequency` is the focal frequency loss (arXiv 2012.12821); `adversarial` a hinge loss with a small
patch discriminator (arXiv 1611.07004), trained along in the same optimizer from the start, and used from a given step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.utils import ModelOutput

from mm_interleaved.training.config import AutoencoderConfig, AutoencoderLossConfig

STATISTICS_BATCHES = 8  # held-out batches that the scale of the latents is measured on


@dataclass
class AutoencoderOutput(ModelOutput):
    """Losses of a batch, each a mean over the images; `loss` is their weighted sum.

    Attributes:
        loss: weighted sum.
        loss_l1: mean absolute difference of pixels in [-1, 1].
        loss_edges, loss_frequency, loss_kl: see the module.
        loss_adversarial, loss_discriminator: hinge losses of the two sides; None without a discriminator.
        psnr: in dB, of pixels in [0, 1]; the mean over images.
        ssim: structural similarity (Wang et al. 2004); only outside training.
        reconstruction: [images, 3, side, side] in [-1, 1]; only outside training.
        latents: of the posterior's mode; only outside training.
    """

    loss: Tensor | None = None
    loss_l1: Tensor | None = None
    loss_edges: Tensor | None = None
    loss_frequency: Tensor | None = None
    loss_kl: Tensor | None = None
    loss_adversarial: Tensor | None = None
    loss_discriminator: Tensor | None = None
    psnr: Tensor | None = None
    ssim: Tensor | None = None
    reconstruction: Tensor | None = None
    latents: Tensor | None = None


class PatchDiscriminator(nn.Module):
    """Images [n, 3, side, side] to one logit a patch of about 34 pixels; positive means real."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for inner, outer in ((width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(inner, outer, 4, 2, 1), nn.GroupNorm(8, outer), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [n, 1, side / 8, side / 8]."""
        return self.layers(pixels)


class AutoencoderTask(nn.Module):
    """The autoencoder together with its losses.

    Args:
        config: sizes.
        losses: weights.
    """

    def __init__(self, config: AutoencoderConfig, losses: AutoencoderLossConfig) -> None:
        super().__init__()
        self.losses = losses
        self.vae = AutoencoderKL(**vae_settings(config))
        self.discriminator = PatchDiscriminator(losses.discriminator_width) if losses.adversarial else None
        self.adversarial = False  # whether the discriminator's opinion counts yet

    def forward(self, pixels: Tensor, noise: Tensor) -> AutoencoderOutput:
        """Losses of reconstructing images.

        Args:
            pixels: [images, 3, side, side] in [-1, 1].
            noise: normal, of the latents' shape.
        """
        posterior = cast(AutoencoderKLOutput, self.vae.encode(pixels)).latent_dist
        latents: Any = posterior.mean + posterior.std * noise.to(posterior.mean)
        made = cast(DecoderOutput, self.vae.decode(latents)).sample
        with torch.autocast(pixels.device.type, enabled=False):
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            outputs = AutoencoderOutput(
                loss_l1=F.l1_loss(made.float(), pixels),
                loss_edges=edge_loss(made.float(), pixels),
                loss_frequency=focal_frequency_loss(made.float(), pixels) if self.losses.frequency else None,
                loss_kl=0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
                psnr=psnr(made.detach().float(), pixels),
            )
            if not self.training:
                outputs.ssim = ssim(made.float(), pixels)  # differences of squares; half precision loses them
        if self.discriminator is not None and self.training:
            outputs.loss_adversarial, outputs.loss_discriminator = self._judge(made, pixels)
        if not self.training:
            outputs.reconstruction, outputs.latents = made, posterior.mode()
        outputs.loss = self._sum(outputs)
        return outputs

    def _judge(self, made: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Hinge losses of the generator, which leaves the discriminator's weights alone, and of the discriminator."""
        assert self.discriminator is not None
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fooled = functional_call(self.discriminator, frozen, (made,))
        real, fake = self.discriminator(torch.cat([pixels.to(made.dtype), made.detach()])).float().chunk(2)
        return -fooled.float().mean(), 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

    def _sum(self, outputs: AutoencoderOutput) -> Tensor:
        weights = self.losses
        assert outputs.loss_l1 is not None
        assert outputs.loss_edges is not None
        assert outputs.loss_kl is not None
        total = weights.l1 * outputs.loss_l1 + weights.edges * outputs.loss_edges + weights.kl * outputs.loss_kl
        if outputs.loss_frequency is not None:
            total = total + weights.frequency * outputs.loss_frequency
        if outputs.loss_discriminator is not None:
            total = total + outputs.loss_discriminator
            assert outputs.loss_adversarial is not None
            total = total + weights.adversarial * self.adversarial * outputs.loss_adversarial
        return total


def vae_settings(config: AutoencoderConfig) -> dict:
    """diffusers' settings; the factor between images and latents is 2 for every width after the first."""
    blocks = len(config.block_out_channels)
    return {
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
        "mid_block_add_attention": config.mid_block_attention,
        "sample_size": config.image_size,
        "scaling_factor": 1.0,
    }


def edge_loss(made: Tensor, wanted: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute difference of neighbouring pixels' differences, over `scales` halvings of the image."""
    total = made.new_zeros(())
    for scale in range(scales):
        if scale:
            made, wanted = F.avg_pool2d(made, 2), F.avg_pool2d(wanted, 2)
        gap = made - wanted
        total = total + gap.diff(dim=-1).abs().mean() + gap.diff(dim=-2).abs().mean()
    return total / scales


def focal_frequency_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Squared difference of spectra, weighed by its own size relative to the largest (arXiv 2012.12821, alpha = 1)."""
    gap = torch.fft.rfft2(made - wanted, norm="ortho")
    power = gap.real.square() + gap.imag.square()
    weight = power.detach().sqrt()
    weight = weight / weight.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-8)
    return (weight * power).mean()


def psnr(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean peak signal-to-noise ratio in dB of images in [-1, 1]."""
    error = (made.clamp(-1, 1) - wanted).square().mean((1, 2, 3)) / 4
    return (-10 * error.clamp(min=1e-10).log10()).mean()


def ssim(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean structural similarity of images in [-1, 1]: Gaussian window of 11 pixels, sigma 1.5."""
    line = torch.arange(11, device=made.device, dtype=made.dtype) - 5
    line = torch.exp(-line.square() / (2 * 1.5**2))
    window = torch.outer(line / line.sum(), line / line.sum()).expand(made.shape[1], 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=made.shape[1])

    a, b = (made.clamp(-1, 1) + 1) / 2, (wanted + 1) / 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a.square(), blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (top / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))).mean()


@torch.no_grad()
def latent_scale(latents: Tensor) -> float:
    """The factor that gives latents a standard deviation of 1.

    Raises:
        ValueError: the latents do not vary.
    """
    deviation = float(latents.float().std())
    if not deviation > 0 or not math.isfinite(deviation):
        raise ValueError(
            f"the latents have a standard deviation of {deviation}; the autoencoder has not learned anything"
        )
    return 1 / deviation


def save_autoencoder(vae: AutoencoderKL, scale: float, folder: Path) -> None:
    """A diffusers folder in float32 with its `scaling_factor`."""
    vae.register_to_config(scaling_factor=scale)
    vae.save_pretrained(folder)
