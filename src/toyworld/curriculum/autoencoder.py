"""The image autoencoder of a small model: diffusers' AutoencoderKL, trained on drawn or given images.

    loss = L1 + edges + kl, each with its weight

`edges` compares horizontal and vertical differences at several scales, which keeps thin lines and letters sharp where
L1 alone blurs them.
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
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .config import AutoencoderConfig, AutoencoderLossConfig

STATISTICS_BATCHES = 8  # held-out batches that the scale of the latents is measured on


@dataclass
class AutoencoderOutput(ModelOutput):
    """Losses of a batch, each a mean over the images; `loss` is their weighted sum.

    Attributes:
        loss: weighted sum.
        loss_l1: mean absolute difference of pixels in [-1, 1].
        loss_edges, loss_kl: see the module.
        psnr: in dB, of pixels in [0, 1]; the mean over images.
        ssim: structural similarity (Wang et al. 2004); only outside training.
        latents: of the posterior's mode; only outside training.
    """

    loss: Tensor | None = None
    loss_l1: Tensor | None = None
    loss_edges: Tensor | None = None
    loss_kl: Tensor | None = None
    psnr: Tensor | None = None
    ssim: Tensor | None = None
    latents: Tensor | None = None


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

    def forward(self, pixels: Tensor, noise: Tensor) -> AutoencoderOutput:
        """Losses of reconstructing images.

        Args:
            pixels: [images, 3, side, side] in [-1, 1].
            noise: normal, of the latents' shape.
        """
        posterior = cast(AutoencoderKLOutput, self.vae.encode(pixels.to(self.vae.dtype))).latent_dist
        latents: Any = posterior.mean + posterior.std * noise.to(posterior.mean)
        made = cast(DecoderOutput, self.vae.decode(latents)).sample
        with torch.autocast(pixels.device.type, enabled=False):  # half precision loses differences of squares
            made, mean, logvar = made.float(), posterior.mean.float(), posterior.logvar.float()
            l1, edges = F.l1_loss(made, pixels), edge_loss(made, pixels)
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            return AutoencoderOutput(
                loss=self.losses.l1 * l1 + self.losses.edges * edges + self.losses.kl * kl,
                loss_l1=l1,
                loss_edges=edges,
                loss_kl=kl,
                psnr=psnr(made.detach(), pixels),
                ssim=None if self.training else ssim(made, pixels),
                latents=None if self.training else posterior.mode(),
            )


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
