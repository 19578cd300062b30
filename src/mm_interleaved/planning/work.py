"""The work of one training step of one process, counted from the model.

Axes: B rows of the batch, L tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..model import MMInterleavedConfig
from ..model.cost import Cost, Part, count_parts, measure
from ..training.building import empty_model
from ..training.config import TrainConfig
from ..training.memory import VAE, BatchSizes, computes_in_half, zero_stage

OPTIMIZER_BYTES = 28  # read and written for a weight: AdamW reads four float32 numbers and writes three
ADAPTER_BYTES = 13  # read and written by LoRA for an input or output of a layer: casts, sums and scales, in one pass
BACKWARD_HOST = 0.6  # time of the host for a backward pass, against a forward pass
SELECTING_HOST = 2.5  # the same for a recomputation for which it chooses each operator


@dataclass(frozen=True)
class ModelWork:
    """What the work of a step follows from, for a model and what is trained of it.

    Attributes:
        cost: multiply-accumulates of the model's parts.
        parts: parameters by the name of the part, and how many of them are trained.
        attention: FLOPs of the attention of a token to one token before it, forward.
        adapted: inputs and outputs of all layers of the language model that have an adapter.
        image_tokens: tokens of an image, with the one that begins it.
        trained: number of trained scalars.
        whole: number of scalars without the VAE, which is never divided.
        frozen_bytes: bytes of the frozen weights in a checkpoint.
    """

    cost: Cost
    parts: dict[str, Part]
    attention: float
    adapted: int
    image_tokens: int
    trained: int
    whole: int
    frozen_bytes: int

    @classmethod
    def of(cls, config: TrainConfig, model_config: MMInterleavedConfig, cost: Cost | None = None) -> ModelWork:
        """The work of the model that a run trains. Takes seconds and no memory at any size.

        Args:
            config: settings of the run.
            model_config: the model.
            cost: what `measure` returns for the model with one image, which takes seconds; None: it is measured.
        """
        model = empty_model(config, model_config)
        text = model_config.text_config
        frozen = [(name, p.numel()) for name, p in model.named_parameters() if not p.requires_grad]
        width, vae_width = (getattr(torch, t).itemsize for t in (config.precision, config.losses.vae_dtype))
        parts = {part.name.strip(): part for part in count_parts(model)}
        of_vae = sum(n for name, n in frozen if name.startswith(VAE))
        return cls(
            cost=measure(model_config, images=1) if cost is None else cost,
            parts=parts,
            attention=4.0 * text.num_attention_heads * text.head_dim * text.num_hidden_layers,
            adapted=_adapted(model),
            image_tokens=model_config.num_image_tokens + 1,
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
        queries: FLOPs of MMFS for the text tokens that look at images in the language model.
        adapter: bytes that adapters read and write, beside their products.
        backward: the share of the FLOPs that the backward pass has.
        optimizer: bytes that the optimizer reads and writes.
        owned: weights that the process updates, if DeepSpeed does it; otherwise 0.
        launches: passes for which the host starts kernels; a forward pass is 1.
        micro_batches: number of forward and backward passes.
    """

    language: float
    vision: float
    denoising: float
    latents: float
    queries: float
    adapter: float
    backward: float
    optimizer: float
    owned: float
    launches: float
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
    text = max(tokens - model.image_tokens * sizes.images, 0) if sizes.images else 0
    selecting = config.gradient_checkpointing and config.selective_checkpointing
    launches = 1 + BACKWARD_HOST + (SELECTING_HOST if selecting else again)
    return StepWork(
        **{name: micro * value for name, value in passes.items()},
        latents=micro * latents,
        queries=micro * text * 2.0 * (cost.token_with_images - cost.token) * (3 + again),
        adapter=micro * tokens * model.adapted * ADAPTER_BYTES * (2 + again),
        backward=backward / total if total else 0.0,
        optimizer=OPTIMIZER_BYTES * model.trained / sharers,
        owned=model.trained / sharers if config.deepspeed else 0.0,
        launches=micro * launches,
        micro_batches=micro,
    )


def _adapted(model: nn.Module) -> int:
    """Inputs and outputs of the layers of the language model that have a LoRA adapter."""
    layers = [m for name, m in model.named_modules() if name.startswith("language_model.") and isinstance(m, LoraLayer)]
    return sum((layer.in_features or 0) + (layer.out_features or 0) for layer in layers)


def _recomputed(config: TrainConfig) -> float:
    """The share of a forward pass that is computed again; selective checkpointing keeps every second product."""
    if not config.gradient_checkpointing:
        return 0.0
    return 0.5 if config.selective_checkpointing else 1.0
