"""The image autoencoder of a small model: diffusers' AutoencoderKL, trained on drawn or given images.

    loss = L1 + 2 edges + 1e-6 kl

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


@dataclass(frozen=True)
class Losses:
    """Of a batch, each a mean over the images; `loss` is their weighted sum.

    Attributes:
        loss: weighted sum.
        l1: mean absolute difference of pixels in [-1, 1].
        edges, kl: see the module.
        psnr: in dB, of pixels in [0, 1].
    """

    loss: Tensor
    l1: Tensor
    edges: Tensor
    kl: Tensor
    psnr: Tensor


class AutoencoderTask(nn.Module):
    """The autoencoder together with its losses.

    Args:
        vae: to be trained.
        edges, kl: weights of these losses; L1 has 1.
    """

    def __init__(self, vae: AutoencoderKL, edges: float = 2.0, kl: float = 1e-6) -> None:
        super().__init__()
        self.vae, self.edges, self.kl = vae, edges, kl

    def forward(self, pixels: Tensor, noise: Tensor) -> Losses:
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
            return Losses(l1 + self.edges * edges + self.kl * kl, l1, edges, kl, psnr(made.detach(), pixels))


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
