"""What a run of the curriculum is: settings of the image autoencoder, the visual tokenizer and the language model."""

from __future__ import annotations

from dataclasses import dataclass, field

from mm_interleaved.training.config import ModelConfig, RunConfig

from ..sampling import SPLITS

SMALL = "'fsdp' is for whole models of documents; parts are small, leave it out"


@dataclass
class AutoencoderConfig:
    """Sizes of the autoencoder; the latents' side is the image's, halved for every width after the first."""

    image_size: int = 128
    block_out_channels: list[int] = field(default_factory=lambda: [32, 48, 64, 64])
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 16
    mid_block_attention: bool = True


@dataclass
class AutoencoderLossConfig:
    """Weights of the losses; see `curriculum.autoencoder`."""

    l1: float = 1.0
    edges: float = 1.0
    kl: float = 1e-6


@dataclass
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
    split: str = "train"
    count: int = 100_000
    batch_size: int = 64
    seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"'split' must be one of {', '.join(SPLITS)}, not '{self.split}'")
        if min(self.count, self.batch_size) < 1:
            raise ValueError(f"'count' ({self.count}) and 'batch_size' ({self.batch_size}) must be at least 1")


@dataclass(kw_only=True)
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
    eval_batches: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fsdp:
            raise ValueError(SMALL)


@dataclass(kw_only=True)
class PartRunConfig(RunConfig):
    """`mmi toyworld train-vision` and `train-language`: a part of a small model, on scenes of the toy world.

    Attributes:
        model: whose part; its weights are fresh, or those that `model.vision` or `model.language` names.
        data: scenes to learn from.
        eval_data: held-out scenes.
        eval_batches: how many batches of them.
    """

    model: ModelConfig
    data: ImagesConfig = field(default_factory=ImagesConfig)
    eval_data: ImagesConfig = field(default_factory=lambda: ImagesConfig(split="val", count=2048))
    eval_batches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.folder is not None or self.eval_data.folder is not None:
            raise ValueError("a part learns from the toy world, whose scenes have labels; leave data.folder out")
        if min(self.data.batch_size, self.eval_data.batch_size) < 2:
            raise ValueError("a part is told by how the scenes of a batch differ; data.batch_size must be at least 2")
        if self.fsdp:
            raise ValueError(SMALL)
        if self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing: parts are trained without it; leave it out")
