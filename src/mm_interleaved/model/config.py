"""The configuration of the model as one tree, with three presets: `release`, `small` and `debug`.

Every size in the network follows from this tree. Parts of other libraries keep their own configuration: `text_config`
is a transformers decoder (Llama, Mistral, Qwen2, Qwen3), `vision_config` is a CLIP vision tower, and
`image_decoder.unet`, `.vae`, `.scheduler` are diffusers configurations.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig

from ..io import InputError, read_json
from ..validation import Count, NonNegativeFloat, Positive, PositiveFloat, Share, parse, settings

SUPPORTED_DECODERS = ("llama", "mistral", "qwen2", "qwen3")


@settings(frozen=False)
class MMFSConfig:
    """One multi-modal feature synchronizer: deformable attention into the maps of earlier images."""

    hidden_size: Positive  # width of the sampled values, over all heads
    levels: list[Positive]  # sides of the sampled maps, fine to coarse
    num_heads: Positive = 16
    num_points: Positive = 8  # sampling points per head and image, shared by all levels
    base_size: Positive | None = None  # offsets count in 1/base_size of the image's side; None: side of the query map
    max_images: Positive = 50  # rows of the relative-position table; row 0 is never used
    offset_init: NonNegativeFloat = 3.0  # offset biases start uniform in +-offset_init
    enabled: bool = True  # False: build the network without these synchronizers (an ablation)


@settings(frozen=False)
class AdapterConfig:
    """The ViT adapter: a convolutional stem exchanging features with the CLIP layers."""

    stem_channels: Positive = 64  # channels of the stem; the three stages after it have 2, 4 and 4 times as many
    num_heads: Positive = 16
    num_points: Positive = 4
    value_ratio: PositiveFloat = 0.5  # width of the attention values relative to the vision width
    mlp_ratio: PositiveFloat = 0.25
    num_extra_extractors: Count = 2  # further extractors after the last interaction


@settings(frozen=False)
class ResamplerConfig:
    """A query transformer that turns any number of feature vectors into `num_queries` vectors."""

    num_queries: Positive
    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    intermediate_size: Positive = 3072
    cross_attention_every: Positive = 1
    qk_norm: bool = False
    initializer_range: NonNegativeFloat = 0.02  # deviation of weights and queries; 0.02 was made for widths near 768
    hidden_dropout: Share = 0.0
    attention_dropout: Share = 0.0
    layer_norm_eps: PositiveFloat = 1e-12


@settings(frozen=False)
class ImageDecoderConfig:
    """The diffusion decoder: resampler, UNet with synchronizers, VAE and noise schedule."""

    image_size: Positive  # side of the decoded image in pixels
    unet: dict[str, Any]  # diffusers UNet2DConditionModel
    vae: dict[str, Any]  # diffusers AutoencoderKL
    scheduler: dict[str, Any]  # diffusers DDPMScheduler
    resampler: ResamplerConfig
    mmfs: MMFSConfig
    unconditional_probability: Share = 0.1  # share of training images that lose their context (guidance)
    vae_batch_size: Positive = 32  # images encoded by the VAE at a time
    previous_images: Count = 1  # number of earlier images of the document that the UNet attends to
    guidance_scale: float = 7.5  # strength of classifier-free guidance, if `ImageSettings.guidance_scale` is None

    @property
    def latent_size(self) -> int:
        """Side of the latent map."""
        return self.image_size // 2 ** (len(self.vae["block_out_channels"]) - 1)

    def skip_shapes(self) -> list[tuple[int, int]]:
        """(channels, side) of every UNet skip connection in order, then of the mid block's output."""
        channels, layers = self.unet["block_out_channels"], self.unet["layers_per_block"]
        side = self.latent_size
        shapes = [(channels[0], side)]
        for index, width in enumerate(channels):
            shapes += [(width, side)] * layers
            if index < len(channels) - 1:
                side //= 2
                shapes.append((width, side))
        return [*shapes, (channels[-1], side)]


@settings
class _Own:
    """The keys that are not of transformers."""

    adapter: AdapterConfig
    visual_resampler: ResamplerConfig
    mmfs: MMFSConfig
    image_decoder: ImageDecoderConfig
    mmfs_every: Positive
    mmfs_implementation: Literal["fast", "reference"]
    max_context_length: Positive
    bos_token_id: Count | None
    eos_token_id: Count | None
    pad_token_id: Count | None
    soi_token_id: Count
    image_token_id: Count
    num_new_tokens: Count
    frozen: list[str] | None
    loss_text_weight: float
    loss_image_weight: float
    normalize_image_loss: bool
    isolate_documents: bool


_OWN = tuple(field.name for field in dataclasses.fields(_Own))
_PARTS = ("adapter", "visual_resampler", "mmfs", "image_decoder")
_SIMILAR = 0.88  # of a key to one of ours: a misspelling. Below: a further key of transformers or of another program
_RESTORE = "restore it from its source, or convert the checkpoint again"


def _as_dict(part: Any) -> Any:
    """A part as a dictionary."""
    return dataclasses.asdict(part) if dataclasses.is_dataclass(part) and not isinstance(part, type) else part


def _library_config(name: str, make: Callable[..., Any], tree: Any) -> Any:
    """The part `name` as a configuration of transformers.

    Raises:
        ValueError: one of its values cannot be used; names the part.
    """
    if not isinstance(tree, dict):
        return tree
    try:
        return make(**tree)
    except (StrictDataclassError, ValueError, TypeError) as error:
        words = " ".join(str(error).split()).rpartition("Error: ")[2]  # without the names of the inner errors
        raise ValueError(f"{name}: {words}") from None


def _check_parts(path: Path) -> None:
    """Whether the file holds an object with every part of the tree."""
    try:
        data = read_json(path, dict)
    except InputError as error:
        raise ValueError(f"{error.where}: {error.problem}; {_RESTORE}") from None
    for name in ("text_config", "vision_config", *_PARTS):
        if not isinstance(data.get(name), dict):
            problem = f"'{name}' must be an object" if name in data else f"it lacks '{name}'"
            raise ValueError(f"'{path}' is not the configuration of a model of this project: {problem}; {_RESTORE}")


# The frozen parameters of the release: regular expressions, matched at the start of a parameter's name.
RELEASE_FROZEN = [
    r"language_model\.(?!.*\.synchronizer\.)",
    r"lm_head\.head\.",
    r"visual_tokenizer\.encoder\.(embeddings|pre_layernorm|layers)\.",
    r"image_decoder\.vae\.",
    r"image_decoder\.unet\.synchronizers\..*\.ignore_token",
]


class MMInterleavedConfig(PreTrainedConfig):
    """Configuration of `MMInterleaved`.

    Attributes:
        text_config: a transformers decoder; its `vocab_size` includes the new tokens.
        vision_config: the CLIP vision tower.
        adapter, visual_resampler, mmfs, image_decoder: see the dataclasses of this module.
        mmfs_every: distance of decoder layers with a synchronizer, from layer 0 on.
        mmfs_implementation: "fast" (exact, the default) or "reference" (the published formula, slow).
        max_context_length: longest context of an image in tokens (the table of context positions).
        num_new_tokens: tokens at the end of the vocabulary that have their own trainable head rows.
        frozen: regular expressions of the parameters that are not trained.
        loss_text_weight, loss_image_weight: weights of the two losses.
        normalize_image_loss: whether to divide the image loss by the images that count instead of all (release: no).
        isolate_documents: whether to restrict self-attention to a document in a packed row (release: no).

    Raises:
        ValueError: a key is unknown or missing, or two sizes do not fit; the message names them.
    """

    model_type = "mm_interleaved"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [  # transformers' Trainer predicts logits alone
        "past_key_values", "loss_txt", "loss_img", "last_hidden_state", "conditions"
    ]  # fmt: skip
    # transformers fills its property of this name from such a table
    sub_configs: ClassVar[dict] = {  # pyright: ignore[reportIncompatibleMethodOverride]
        "text_config": AutoConfig,
        "vision_config": CLIPVisionConfig,
    }

    text_config: Any = None
    vision_config: Any = None
    adapter: Any = None
    visual_resampler: Any = None
    mmfs: Any = None
    image_decoder: Any = None
    mmfs_every: int = 4
    mmfs_implementation: str = "fast"
    max_context_length: int = 2048
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 31999
    soi_token_id: int = 32000
    image_token_id: int = 32001
    num_new_tokens: int = 2
    frozen: Any = None
    loss_text_weight: float = 1.0
    loss_image_weight: float = 10.0
    normalize_image_loss: bool = False
    isolate_documents: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:  # transformers builds empty configurations to find the defaults
            return super().__post_init__(**kwargs)
        self._refuse_other_keys(kwargs)
        self.text_config = _library_config("text_config", AutoConfig.for_model, self.text_config)
        self.vision_config = _library_config("vision_config", CLIPVisionConfig, self.vision_config)
        own = parse({name: _as_dict(getattr(self, name)) for name in _OWN}, _Own, "model configuration")
        for name in _PARTS:
            setattr(self, name, getattr(own, name))
        self.frozen = list(RELEASE_FROZEN if self.frozen is None else self.frozen)
        for pattern in self.frozen:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"config: frozen holds '{pattern}', which is no regular expression: {error}") from None
        super().__post_init__(**kwargs)
        self._check_sizes()
        return None

    def _refuse_other_keys(self, others: dict[str, Any]) -> None:
        """Check the keys without a field: the type of another model, and misspelled keys of this one."""
        if (kind := others.get("model_type", self.model_type)) != self.model_type:
            raise ValueError(f"config: model_type is '{kind}', but this model's is '{self.model_type}'")
        for name in others:
            close = difflib.get_close_matches(name, (*_OWN, "text_config", "vision_config"), n=1, cutoff=_SIMILAR)
            if close:
                raise ValueError(f"config: unknown key '{name}'. Did you mean '{close[0]}'?")

    @property
    def grid_size(self) -> int:
        """Side of the vision tower's patch grid."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def pyramid_sides(self) -> list[int]:
        """Sides of the four feature maps of an image, fine to coarse."""
        grid = self.grid_size
        return [4 * grid, 2 * grid, grid, grid // 2]

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens per image."""
        return self.visual_resampler.num_queries

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary with the new tokens."""
        return self.text_config.vocab_size

    def _check_sizes(self) -> None:
        text, vision, decoder = self.text_config, self.vision_config, self.image_decoder
        sides = self.pyramid_sides
        heads = {"mmfs": self.mmfs, "image_decoder.mmfs": decoder.mmfs}
        checks = [
            (text.model_type in SUPPORTED_DECODERS, f"text_config.model_type '{text.model_type}' is not one of "
             f"{', '.join(SUPPORTED_DECODERS)}"),
            (vision.image_size % vision.patch_size == 0, "vision_config.image_size must be a multiple of patch_size"),
            (self.grid_size % 2 == 0, f"the patch grid must have an even side, not {self.grid_size}"),
            (vision.num_hidden_layers % 4 == 0, "vision_config.num_hidden_layers must be a multiple of 4 (one group "
             f"per interaction), not {vision.num_hidden_layers}"),
            (set(self.mmfs.levels) <= set(sides), f"mmfs.levels {self.mmfs.levels} are not among the image's maps "
             f"{sides}"),
            (decoder.mmfs.levels == sides, f"image_decoder.mmfs.levels must be all the image's maps {sides}, not "
             f"{decoder.mmfs.levels}"),
            ({decoder.unet.get(f"{way}_channels", 4) for way in ("in", "out")} == {decoder.vae["latent_channels"]},
             "image_decoder.unet.in_channels and out_channels must equal the VAE's latent_channels "
             f"{decoder.vae['latent_channels']}"),
            (decoder.resampler.hidden_size == decoder.unet["cross_attention_dim"], "image_decoder.resampler."
             f"hidden_size {decoder.resampler.hidden_size} must equal the UNet's cross_attention_dim "
             f"{decoder.unet['cross_attention_dim']}"),
            (decoder.latent_size % 2 ** (len(decoder.unet["block_out_channels"]) - 1) == 0, "image_decoder.image_size "
             f"{decoder.image_size} gives latents of side {decoder.latent_size}, which the UNet cannot halve evenly"),
            (decoder.previous_images < decoder.mmfs.max_images, "image_decoder.previous_images must be smaller than "
             "image_decoder.mmfs.max_images"),
            (max(self.soi_token_id, self.image_token_id) < text.vocab_size, "the image tokens lie outside the "
             f"vocabulary of {text.vocab_size}"),
        ]  # fmt: skip
        checks += [
            (m.hidden_size % m.num_heads == 0, f"{name}.hidden_size {m.hidden_size} is not a multiple of num_heads "
             f"{m.num_heads}") for name, m in heads.items()
        ]  # fmt: skip
        for holds, message in checks:
            if not holds:
                raise ValueError(f"config: {message}")

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  # hands all options on
        cls, source: str | Path, **kwargs: Any
    ) -> Any:
        """As in transformers, but with an error that says what is wrong in the file.

        Raises:
            ValueError: a part is missing, or a value is of the wrong type or size; names the file.
        """
        path = Path(source) / "config.json"
        if path.is_file():
            _check_parts(path)
        try:
            return super().from_pretrained(source, **kwargs)
        except (StrictDataclassError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            words = " ".join(str(error).split())  # what values of a wrong type lead to, here and in the libraries
            reason = f"it lacks {words}" if isinstance(error, LookupError) else words
            raise ValueError(f"'{path}' cannot be used: {reason}; {_RESTORE}") from None

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain data."""
        tree = super().to_dict()
        tree |= {name: _as_dict(tree.get(name)) for name in _PARTS}
        return tree

    @classmethod
    def preset(cls, name: str) -> MMInterleavedConfig:
        """The preset `release`, `small` or `debug`.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset '{name}'; there are {', '.join(PRESETS)}")
        return cls(**PRESETS[name]())


# The scheduler file of SD-2.1-base, written for PNDM, as DDPM reads it (docs/model.md, "Image generation").
SD_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
}


def _release() -> dict[str, Any]:
    """The published 13B model: Vicuna-13B, CLIP ViT-L/14, SD-2.1-base."""
    return {
        "text_config": {
            "model_type": "llama",
            "vocab_size": 32002,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
        },
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "projection_dim": 768,
        },
        "adapter": {},
        "visual_resampler": {
            "num_queries": 64,
            "hidden_size": 768,
            "num_layers": 12,
            "num_heads": 12,
            "cross_attention_every": 2,
            "qk_norm": True,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "mmfs": {"hidden_size": 1024, "levels": [32, 16, 8], "base_size": 16},
        "image_decoder": {
            "image_size": 512,
            "unet": {
                "sample_size": 64,
                "block_out_channels": [320, 640, 1280, 1280],
                "layers_per_block": 2,
                "attention_head_dim": [5, 10, 20, 20],
                "cross_attention_dim": 1024,
                "use_linear_projection": True,
            },
            "vae": _vae([128, 256, 512, 512], 768),
            "scheduler": dict(SD_SCHEDULER),
            "resampler": {"num_queries": 77, "hidden_size": 1024, "num_layers": 1, "num_heads": 16},
            "mmfs": {"hidden_size": 1024, "levels": [64, 32, 16, 8], "max_images": 10, "offset_init": 1.0},
        },
    }


def _vae(
    channels: list[int], sample_size: int, groups: int = 32, latent_channels: int = 4, layers: int = 2
) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": layers,
        "latent_channels": latent_channels,
        "norm_num_groups": groups,
        "sample_size": sample_size,
        "scaling_factor": 0.18215,
    }


def _small_image_decoder() -> dict[str, Any]:
    """The image decoder of the small model."""
    return {
        "image_size": 128,
        "guidance_scale": 2.5,
        # Most of the arithmetic is at the resolution of the latents, an eighth of the side of the image.
        "unet": {
            "sample_size": 16,
            "in_channels": 16,
            "out_channels": 16,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3,
            "block_out_channels": [96, 96, 64],
            "layers_per_block": 1,
            "attention_head_dim": [3, 3, 2],
            "cross_attention_dim": 128,
            "use_linear_projection": True,
            "norm_num_groups": 16,
        },
        "vae": {
            **_vae([32, 64, 96, 96], 128, groups=16, latent_channels=16, layers=1),
            "mid_block_add_attention": False,
        },
        # Latents of these images are smooth: at most time steps the noise can be predicted without any condition,
        # so the loss of the noise hardly depends on the conditions. The loss of the velocity does. The last timestep
        # is noise alone (arXiv 2305.08891), so that nothing of an image shines through where generation begins.
        "scheduler": {
            **SD_SCHEDULER, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        "resampler": {
            "num_queries": 16, "hidden_size": 128, "num_layers": 1, "num_heads": 4, "intermediate_size": 512,
            "initializer_range": 0.09,
        },
        "mmfs": {
            "hidden_size": 128, "levels": [32, 16, 8, 4], "num_heads": 8, "num_points": 4, "max_images": 10,
            "offset_init": 1.0,
        },
    }  # fmt: skip


def _small() -> dict[str, Any]:
    """About 15 M parameters, images of 128 px; meant for a laptop CPU."""
    return {
        "text_config": {
            "model_type": "llama",
            "vocab_size": 2050,
            "hidden_size": 192,
            "intermediate_size": 480,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
        },
        "vision_config": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "image_size": 128,
            "patch_size": 16,
        },
        "adapter": {"stem_channels": 16, "num_heads": 8},
        "visual_resampler": {
            "num_queries": 16,
            "hidden_size": 128,
            "num_layers": 3,
            "num_heads": 4,
            "intermediate_size": 384,
            "cross_attention_every": 2,
            "qk_norm": True,
            "initializer_range": 0.09,
        },
        "mmfs": {"hidden_size": 128, "levels": [16, 8, 4], "num_heads": 8, "num_points": 4, "base_size": 8},
        "image_decoder": _small_image_decoder(),
        "max_context_length": 2048,
        "pad_token_id": 3,
        "soi_token_id": 2048,
        "image_token_id": 2049,
        "frozen": [r"image_decoder\.vae\.", r"image_decoder\.unet\.synchronizers\..*\.ignore_token"],
    }  # fmt: skip


def _debug() -> dict[str, Any]:
    """For tests: every part present, built in well under a second."""
    tree = _small()
    tree["text_config"] |= {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
        "max_position_embeddings": 512,
    }  # fmt: skip
    tree["vision_config"] |= {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56,
        "patch_size": 14,
    }  # fmt: skip
    tree["adapter"] = {"stem_channels": 8, "num_heads": 4}
    tree["visual_resampler"] |= {
        "num_queries": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32,
    }  # fmt: skip
    tree["mmfs"] = {"hidden_size": 16, "levels": [8, 4, 2], "num_heads": 4, "num_points": 2, "base_size": 4}
    tree["mmfs_every"] = 2
    decoder = tree["image_decoder"]
    decoder["image_size"] = 32
    decoder["unet"] |= {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [16, 24, 32],
        "attention_head_dim": [2, 3, 4], "cross_attention_dim": 32, "norm_num_groups": 8,
    }  # fmt: skip
    decoder["vae"] = _vae([8, 16, 16], 32, groups=8)
    decoder["scheduler"] = {**SD_SCHEDULER, "prediction_type": "v_prediction"}
    decoder["guidance_scale"] = 6.0
    decoder["resampler"] |= {"num_queries": 6, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    decoder["mmfs"] |= {"hidden_size": 16, "levels": [16, 8, 4, 2], "num_heads": 4, "num_points": 2}
    tree["max_context_length"] = 512
    return tree


PRESETS = {"release": _release, "small": _small, "debug": _debug}
