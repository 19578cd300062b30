"""The arithmetic of a training step, for its share of the device's peak (MFU).

The estimate is 2 operations for each multiply-accumulate of `model.cost.measure`, for every token, encoded image and
noise sample: once forward, once backward for activations, and once more for weights that are trained. Attention between
tokens, MMFS sampling, the VAE and recomputation are left out, so the figure is a lower bound.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..model import MMInterleavedConfig, MMInterleavedModel
from ..model.cost import Cost, Part, count_parts, measure
from .gpus import PEAKS


@dataclass
class StepCost:
    """FLOPs of training on one token, on one encoded image and on one noise sample."""

    token: float
    image: float
    noise_sample: float

    def of(self, tokens: float, images: float, noise_samples: float) -> float:
        """FLOPs of so many tokens, images and noise samples."""
        return tokens * self.token + images * self.image + noise_samples * self.noise_sample


def step_cost(
    config: MMInterleavedConfig, model: MMInterleavedModel | None = None, cost: Cost | None = None
) -> StepCost:
    """The cost of training the model that `config` describes.

    Args:
        config: its configuration.
        model: the model of a run, which says what is trained (an adapter, or all but frozen parts); None: all but what
            the configuration freezes.
        cost: what `measure` returns for the configuration, which takes seconds; None: it is measured.
    """
    cost = measure(config, images=1) if cost is None else cost
    parts = {part.name.strip(): part for part in (cost.parts if model is None else count_parts(model))}
    return StepCost(
        token=2 * cost.token * _passes(parts["language_model"]),
        image=2 * cost.encode_image * _passes(parts["visual_tokenizer"]),
        noise_sample=2 * cost.draw_step / 2 * _passes(parts["unet"]),  # `draw_step` counts both halves of guidance
    )


def _passes(part: Part) -> float:
    return 2 + part.trainable / max(part.total, 1)


def peak_flops(device: torch.device, tflops: float | None = None) -> float | None:
    """Peak FLOP/s of a device; None if it is not known."""
    if tflops is not None:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Peak FLOP/s of a device with the name that its driver gives it; None if it is not known."""
    return next((1e12 * peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
