"""The language model: a transformers decoder in which every k-th layer also attends to images by MMFS.

Embeddings, final norm, rotary positions, masks and caches are the library's (Llama, Mistral, Qwen2 or Qwen3, by
`text_config`). The layers are `MMFSDecoderLayer`s, made of the library's parts.

Axes: B batch, L tokens, D width, I images, S spatial positions of all levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from .config import MMInterleavedConfig
from .decoder_layer import MMFSDecoderLayer
from .rms_norm import RMSNorm
from .synchronizer import ImageFeatures, Synchronizer
from .typed_modules import module_list

if TYPE_CHECKING:
    from .typed_modules import ModuleListOf

    class LanguageModel(PreTrainedModel):
        """The result of `build_language_model`, for type checkers; its class is one of the library's."""

        embed_tokens: nn.Embedding
        layers: ModuleListOf[MMFSDecoderLayer]
        norm: RMSNorm
        vocab_size: int


def build_language_model(config: MMInterleavedConfig) -> LanguageModel:
    """The decoder of `config.text_config` with a synchronizer in every k-th layer.

    Its `forward` also takes `images` (`ImageFeatures`) and `visible` (`VisibleImages`, a group is one token).
    """
    model: Any = AutoModel.from_config(config.text_config)
    layers = []
    for index, layer in enumerate(model.layers):
        wanted = config.mmfs.enabled and index % config.mmfs_every == 0
        layers.append(MMFSDecoderLayer(layer, Synchronizer(config, index // config.mmfs_every) if wanted else None))
    model.layers = module_list(layers)
    model.norm = RMSNorm.of(model.norm)
    return model


def attention_window(config: Any, length: int) -> int | None:
    """The number of columns that a token of a row attends to, for a mask of our own; None: all columns.

    Args:
        config: the decoder's configuration.
        length: tokens of the row.

    Raises:
        ValueError: the decoder takes no mask of our own.
    """
    if "flash" in (config._attn_implementation or ""):
        raise ValueError(
            f"attn_implementation='{config._attn_implementation}' cannot keep the samples of a row apart; take 'sdpa', "
            "or rows of one sample (packing: single)"
        )
    window = getattr(config, "sliding_window", None)
    if window is None or window >= length:
        return None
    if len(kinds := set(getattr(config, "layer_types", None) or ["sliding_attention"])) > 1:
        raise ValueError(
            f"some layers of this decoder attend to {window} columns and others to all, so that samples cannot be kept "
            f"apart in rows of {length} tokens; take shorter rows, or rows of one sample (packing: single)"
        )
    return None if kinds == {"full_attention"} else window


def synchronizers(model: LanguageModel) -> list[Synchronizer]:
    """The synchronizers of a language model, in the order of their layers."""
    return [layer.synchronizer for layer in model.layers if layer.synchronizer is not None]


def image_features(config: MMInterleavedConfig, pyramid: list[Tensor]) -> ImageFeatures:
    """The levels for the language model, from a pyramid of maps [I, vision width, side, side]."""
    maps = [m for m in pyramid if m.shape[-1] in config.mmfs.levels]
    features = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
    return ImageFeatures(features, [(m.shape[-2], m.shape[-1]) for m in maps])
