"""The language model: a transformers decoder in which every k-th layer also looks at the pictures through MMFS.

The decoder is the library's own (Llama, Mistral, Qwen2 or Qwen3, as `text_config` says): its embeddings, attention,
MLP, norms, rotary positions, masks and caches. Only the decoder layer is ours, for the one line that is new:

    x = x + self_attention(norm(x))
    x = x + tanh(gate) * MMFS(norm(x), norm(maps))        in layers 0, k, 2k, ...
    x = x + mlp(norm(x))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ..ops.deformable import Shapes
from .config import MMInterleavedConfig
from .mmfs import MMFS, PreparedMMFS, VisibleImages


@dataclass
class ImageMemory:
    """The pictures as the decoder's synchronizers see them.

    Attributes:
        features: [pictures, positions, vision width], the levels of `mmfs.levels` one after the other.
        shapes: (height, width) of every level.
        prepared: for every MMFS layer what it derived from the features; None: derived anew in each call (training).
    """

    features: Tensor
    shapes: Shapes
    prepared: list[PreparedMMFS] | None = None

    def __len__(self) -> int:
        return len(self.features)


class Synchronizer(nn.Module):
    """The gated MMFS of one decoder layer."""

    def __init__(self, config: MMInterleavedConfig, index: int) -> None:
        super().__init__()
        width, feature_width = config.text_config.hidden_size, config.vision_config.hidden_size
        eps = config.text_config.rms_norm_eps
        self.index = index
        self.base_size = config.mmfs.base_size or config.grid_size
        self.query_norm = LlamaRMSNorm(width, eps)
        self.feature_norm = LlamaRMSNorm(feature_width, eps)
        self.mmfs = MMFS(config.mmfs, width, feature_width)
        self.gate = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        """The gate starts closed."""
        nn.init.zeros_(self.gate)

    def prepare(self, features: Tensor, known: PreparedMMFS | None = None) -> PreparedMMFS:
        """What this layer keeps of `features` [pictures, positions, width]; `known` is what it keeps of others."""
        return self.mmfs.prepare(self.feature_norm(features), None if known is None else known.folded)

    def forward(self, hidden: Tensor, memory: ImageMemory, visible: VisibleImages) -> Tensor:
        """What the tokens `hidden` [batch, length, width] see; a group of `visible` is one token."""
        if memory.prepared is not None:
            prepared = memory.prepared[self.index]
        else:
            prepared = PreparedMMFS(self.mmfs.project(self.feature_norm(memory.features)))
        query = self.query_norm(hidden).flatten(0, 1)[:, None]
        centre = torch.full((1, 1, 2), 0.5, device=hidden.device)
        seen = self.mmfs(query, prepared, visible, memory.shapes, centre, self.base_size)
        return (self.gate.tanh() * seen.view_as(hidden)).to(hidden.dtype)


class MMFSDecoderLayer(GradientCheckpointingLayer):
    """A library decoder layer's own parts, with an optional synchronizer between attention and MLP."""

    def __init__(self, layer: nn.Module, synchronizer: Synchronizer | None) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.synchronizer = synchronizer
        if hasattr(layer, "attention_type"):  # read by the models that mix kinds of attention
            self.attention_type = layer.attention_type

    def forward(
        self,
        hidden_states: Tensor,
        *,
        memory: ImageMemory,
        visible: VisibleImages,
        **kwargs: object,
    ) -> Tensor:
        """`hidden_states` [batch, length, width]; `kwargs` are the library's own arguments for its attention."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        if self.synchronizer is not None:
            hidden_states = hidden_states + self.synchronizer(hidden_states, memory, visible)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def build_language_model(config: MMInterleavedConfig) -> PreTrainedModel:
    """The decoder of `config.text_config`, synchronizers in every k-th layer; `forward` takes `memory`, `visible`."""
    model = AutoModel.from_config(config.text_config)
    layers = []
    for index, layer in enumerate(model.layers):
        wanted = config.mmfs.enabled and index % config.mmfs_every == 0
        layers.append(MMFSDecoderLayer(layer, Synchronizer(config, index // config.mmfs_every) if wanted else None))
    model.layers = nn.ModuleList(layers)
    return model


def synchronizers(model: PreTrainedModel) -> list[Synchronizer]:
    """The synchronizers of a language model, in the order of their layers."""
    return [layer.synchronizer for layer in model.layers if layer.synchronizer is not None]


def image_memory(config: MMInterleavedConfig, pyramid: list[Tensor]) -> ImageMemory:
    """The levels that the decoder reads, out of a pyramid of maps [pictures, width, side, side]."""
    maps = [m for m in pyramid if m.shape[-1] in config.mmfs.levels]
    features = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
    return ImageMemory(features, [(m.shape[-2], m.shape[-1]) for m in maps])
