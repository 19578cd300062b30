"""The work of one training step of one process, counted from the model.

Axes: B rows of the batch, L tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..model import MMInterleavedConfig
from ..model.cost import Cost, Part, count_parts, measure
from ..training.building import empty_model
from ..training.config import TrainConfig
from ..training.memory import VAE, BatchSizes, computes_in_half, zero_stage

OPTIMIZER_BYTES = 28  # read and written for a weight: AdamW reads four float32 numbers and writes three


@dataclass(frozen=True)
class ModelWork:
    """What the work of a step follows from, for a model and what is trained of it.

    Attributes:
        cost: multiply-accumulates of the model's parts.
        parts: parameters by the name of the part, and how many of them are trained.
        attention: FLOPs of the attention of a token to one token before it, forward.
        trained: number of trained scalars.
        whole: number of scalars without the VAE, which is never divided.
        frozen_bytes: bytes of the frozen weights in a checkpoint.
    """

    cost: Cost
    parts: dict[str, Part]
    attention: float
    trained: int
    whole: int
    frozen_bytes: int

    @classmethod
    def of(cls, config: TrainConfig, model_config: MMInterleavedConfig) -> ModelWork:
        """The work of the model that a run trains. Takes seconds and no memory at any size."""
        model = empty_model(config, model_config)
        text = model_config.text_config
        frozen = [(name, p.numel()) for name, p in model.named_parameters() if not p.requires_grad]
        width, vae_width = (getattr(torch, t).itemsize for t in (config.precision, config.losses.vae_dtype))
        parts = {part.name.strip(): part for part in count_parts(model)}
        of_vae = sum(n for name, n in frozen if name.startswith(VAE))
        return cls(
            cost=measure(model_config, images=1),
            parts=parts,
            attention=4.0 * text.num_attention_heads * text.head_dim * text.num_hidden_layers,
            trained=parts["model"].trainable,
            whole=parts["model"].total - of_vae,
            frozen_bytes=sum(n * (vae_width if name.startswith(VAE) else width) for name, n in frozen),
        )


@dataclass(frozen=True)
class StepWork:
    """The work of one step of one process, with all its micro-batches.

    Attributes:
        language, vision, denoising, latents: FLOPs of the language model, of the visual tokenizer with the projection
            of MMFS values, of the UNet, and of the VAE in float32. In half precision the VAE counts as `denoising`.
        backward: the share of them that the backward pass has.
        optimizer: bytes that the optimizer reads and writes.
        micro_batches: number of forward and backward passes.
    """

    language: float
    vision: float
    denoising: float
    latents: float
    backward: float
    optimizer: float
    micro_batches: int

    @property
    def flops(self) -> float:
        """All FLOPs."""
        return self.language + self.vision + self.denoising + self.latents


def step_work(config: TrainConfig, model: ModelWork, sizes: BatchSizes, world_size: int = 1) -> StepWork:
    """The work of a step with batches of these sizes.

    A part takes one pass forward, one backward for its activations, one for the share of its weights that is trained,
    and one that computes again what checkpointing dropped. A part in front of everything that is trained has no
    backward pass.

    Args:
        config: settings of the run.
        model: the model's work.
        sizes: sizes of a batch of one process.
        world_size: number of processes, which may share the optimizer's work.
    """
    cost, tokens = model.cost, sizes.rows * sizes.tokens
    again = _recomputed(config)
    forward = {
        "language": 2.0 * tokens * cost.token + tokens * model.attention * sizes.tokens / 2,
        "vision": 2.0 * sizes.images * cost.encode_image,
        "denoising": sizes.targets * config.losses.noise_samples_per_image * cost.draw_step,  # one of two halves
    }
    names = {"language": "language_model", "vision": "visual_tokenizer", "denoising": "image_decoder"}
    passes, backward = {}, 0.0
    for name, part in names.items():
        share = model.parts[part].trainable / max(model.parts[part].total, 1)
        reached = name != "vision" or share > 0  # nothing in front of the visual tokenizer is trained
        behind = (1 + share + again) if reached else 0.0
        passes[name] = forward[name] * (1 + behind)
        backward += forward[name] * behind
    latents = 2.0 * sizes.targets * cost.encode_latents
    if computes_in_half(config) or config.losses.vae_dtype != "float32":
        passes["denoising"], latents = passes["denoising"] + latents, 0.0
    total = sum(passes.values()) + latents
    sharers = world_size if config.fsdp or zero_stage(config) >= 1 else 1
    micro = config.accumulation
    return StepWork(
        **{name: micro * value for name, value in passes.items()},
        latents=micro * latents,
        backward=backward / total if total else 0.0,
        optimizer=OPTIMIZER_BYTES * model.trained / sharers,
        micro_batches=micro,
    )


def _recomputed(config: TrainConfig) -> float:
    """The share of a forward pass that is computed again; selective checkpointing keeps every second product."""
    if not config.gradient_checkpointing:
        return 0.0
    return 0.5 if config.selective_checkpointing else 1.0
