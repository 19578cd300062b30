"""What a run of the curriculum is: settings of the image autoencoder, the visual tokenizer and the language model."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from mm_interleaved.training.config import ModelConfig, RunConfig
from mm_interleaved.validation import Count, NonNegativeFloat, Positive, Seed, settings

SMALL = "'fsdp' is for whole models of documents; parts are small, leave it out"


@settings
class AutoencoderConfig:
    """Sizes of the autoencoder; the latents' side is the image's, halved for every width after the first."""

    image_size: Positive = 128
    block_out_channels: list[Positive] = field(default_factory=lambda: [32, 48, 64, 64])
    layers_per_block: Positive = 2
    latent_channels: Positive = 4
    norm_num_groups: Positive = 16
    mid_block_attention: bool = True


@settings
class AutoencoderLossConfig:
    """Weights of the losses; see `toyworld.curriculum.autoencoder`."""

    l1: NonNegativeFloat = 1.0
    edges: NonNegativeFloat = 1.0
    kl: NonNegativeFloat = 1e-6


@settings
class ImagesConfig:
    """What an autoencoder or another part of a model sees: a folder of images, or scenes of the toy world.

    Attributes:
        folder: every image below it; None: the toy world.
        split: of the toy world.
        count: scenes of an epoch.
        batch_size: images a batch and process.
        seed: of scenes and order.
        num_workers: processes that draw or read.
    """

    folder: str | None = None
    split: Literal["train", "val", "test"] = "train"
    count: Positive = 100_000
    batch_size: Positive = 64
    seed: Seed = 0
    num_workers: Count = 0


@settings(kw_only=True)
class AutoencoderRunConfig(RunConfig):
    """`mmi toyworld train-vae`: an image autoencoder.

    Attributes:
        autoencoder: its sizes.
        losses: their weights.
        data: images to learn from.
        eval_data: held-out images, for PSNR and SSIM and for the scale of the latents.
        eval_batches: how many batches of them.
    """

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    losses: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    data: ImagesConfig = field(default_factory=ImagesConfig)
    eval_data: ImagesConfig = field(default_factory=lambda: ImagesConfig(split="val", count=2048))
    eval_batches: Positive = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fsdp:
            raise ValueError(SMALL)


@settings(kw_only=True)
class PartRunConfig(RunConfig):
    """`mmi toyworld train-vision` and `train-language`: a part of a small model, on scenes of the toy world.

    Attributes:
        model: whose part; its weights are fresh, or those that `model.weights` names.
        data: scenes to learn from.
        eval_data: held-out scenes.
        eval_batches: how many batches of them.
    """

    model: ModelConfig
    data: ImagesConfig = field(default_factory=ImagesConfig)
    eval_data: ImagesConfig = field(default_factory=lambda: ImagesConfig(split="val", count=2048))
    eval_batches: Positive = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.folder is not None or self.eval_data.folder is not None:
            raise ValueError("a part learns from the toy world, whose scenes have labels; leave data.folder out")
        if min(self.data.batch_size, self.eval_data.batch_size) < 2:
            raise ValueError("the loss needs scenes that differ within a batch; data.batch_size must be at least 2")
        if self.fsdp:
            raise ValueError(SMALL)
        if self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing: parts are trained without it; leave it out")
