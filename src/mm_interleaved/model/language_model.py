"""The language model: a transformers decoder in which every k-th layer also looks at the pictures through MMFS.

The decoder is the library's own (Llama, Mistral, Qwen2 or Qwen3, as `text_config` says): its embeddings, attention,
MLP, norms, rotary positions, masks and caches. Only the decoder layer is ours, for the one line that is new:

    x = x + self_attention(norm(x))
    x = x + tanh(gate) * MMFS(norm(x), norm(maps))        in layers 0, k, 2k, ...
    x = x + mlp(norm(x))

What stands between its matrix products takes one kernel each: `RMSNorm` through PyTorch's own, `attend` and `gated`
through `ops/pointwise.py`. They compute what the modules of the library compute, from the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from ..ops import rotary, silu_gate
from ..ops.deformable import Shapes
from .config import MMInterleavedConfig
from .mmfs import MMFS, DerivedQuery, VisibleImages
from .weights import plain_class


@dataclass
class ImageMemory:
    """The pictures as the decoder's synchronizers see them.

    Attributes:
        features: [pictures, positions, vision width], the levels of `mmfs.levels` one after the other.
        shapes: (height, width) of every level.
        values: for every MMFS layer its values of the images; None: projected anew in each call (training).
        derived: for every MMFS layer its query maps as one; None: the maps themselves.
    """

    features: Tensor
    shapes: Shapes
    values: list[Tensor] | None = None
    derived: list[DerivedQuery | None] | None = None

    def __len__(self) -> int:
        return len(self.features)


@plain_class
class RMSNorm(LlamaRMSNorm):
    """The norm of all supported decoders (arXiv 1910.07467) in one kernel, forward and backward, on CUDA devices.

    In half precision it rounds once, at the end; the library's rounds before the gain as well.
    """

    @classmethod
    def of(cls, norm: nn.Module) -> RMSNorm:
        """One with the weight of a norm of the library, whichever decoder's."""
        ours = cls(0, norm.variance_epsilon)
        ours.weight = norm.weight
        return ours.train(norm.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., width], normalised."""
        if hidden_states.device.type != "cuda" or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)  # under autocast the result is float32, as the library's
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def attend(
    attention: nn.Module,
    hidden: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    **kwargs: object,
) -> Tensor:
    """What the library's `attention(hidden, ...)` gives, with queries and keys turned by one kernel.

    Args:
        attention: of a supported decoder.
        hidden: [batch, length, width].
        position_embeddings: cos and sin, [batch or 1, length, head dim] each.
        attention_mask, past_key_values, kwargs: as the library's decoder hands them to its attention.

    Returns:
        [batch, length, width].
    """
    config, heads = attention.config, (*hidden.shape[:-1], -1, attention.head_dim)
    query, key, value = (m(hidden).view(heads) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = rotary(query, key, *position_embeddings)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)
    dropout = attention.attention_dropout if attention.training else 0.0
    window = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
    mixed, _ = interface(
        attention, query, key, value, attention_mask, dropout=dropout, scaling=attention.scaling,
        sliding_window=window, **kwargs,
    )  # fmt: skip
    return attention.o_proj(mixed.reshape(*hidden.shape[:-1], -1))


def gated(mlp: nn.Module, hidden: Tensor) -> Tensor:
    """What the library's `mlp(hidden)` gives, with the gate in one kernel if it is a SwiGLU."""
    if mlp.config.hidden_act != "silu":
        return mlp(hidden)
    return mlp.down_proj(silu_gate(mlp.gate_proj(hidden), mlp.up_proj(hidden)))


class Synchronizer(nn.Module):
    """The gated MMFS of one decoder layer."""

    def __init__(self, config: MMInterleavedConfig, index: int) -> None:
        super().__init__()
        width, feature_width = config.text_config.hidden_size, config.vision_config.hidden_size
        eps = config.text_config.rms_norm_eps
        self.index = index
        self.base_size = config.mmfs.base_size or config.grid_size
        self.query_norm = RMSNorm(width, eps)
        self.feature_norm = RMSNorm(feature_width, eps)
        self.mmfs = MMFS(config.mmfs, width, feature_width)
        self.gate = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        """The gate starts closed."""
        nn.init.zeros_(self.gate)

    def project(self, features: Tensor) -> Tensor:
        """The values [images, positions, heads, head dim] of `features` [images, positions, width]."""
        return self.mmfs.project(self.feature_norm(features))

    def forward(self, hidden: Tensor, memory: ImageMemory, visible: VisibleImages) -> Tensor:
        """What the tokens `hidden` [batch, length, width] see; a group of `visible` is one token."""
        values = self.project(memory.features) if memory.values is None else memory.values[self.index]
        derived = None if memory.derived is None else memory.derived[self.index]
        query = self.query_norm(hidden).flatten(0, 1)[:, None]
        centre = torch.full((1, 1, 2), 0.5, device=hidden.device)
        seen = self.mmfs(query, values, visible, memory.shapes, centre, self.base_size, derived)
        return (self.gate.tanh() * seen.view_as(hidden)).to(hidden.dtype)


class MMFSDecoderLayer(GradientCheckpointingLayer):
    """A library decoder layer's own parts, with an optional synchronizer between attention and MLP."""

    def __init__(self, layer: nn.Module, synchronizer: Synchronizer | None) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        if hasattr(self.self_attn, "q_norm"):
            self.self_attn.q_norm, self.self_attn.k_norm = (
                RMSNorm.of(norm) for norm in (self.self_attn.q_norm, self.self_attn.k_norm)
            )
        self.input_layernorm = RMSNorm.of(layer.input_layernorm)
        self.post_attention_layernorm = RMSNorm.of(layer.post_attention_layernorm)
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
        hidden_states = hidden_states + attend(self.self_attn, self.input_layernorm(hidden_states), **kwargs)
        if self.synchronizer is not None:
            hidden_states = hidden_states + self.synchronizer(hidden_states, memory, visible)
        return hidden_states + gated(self.mlp, self.post_attention_layernorm(hidden_states))


def build_language_model(config: MMInterleavedConfig) -> PreTrainedModel:
    """The decoder of `config.text_config`, synchronizers in every k-th layer; `forward` takes `memory`, `visible`."""
    model = AutoModel.from_config(config.text_config)
    layers = []
    for index, layer in enumerate(model.layers):
        wanted = config.mmfs.enabled and index % config.mmfs_every == 0
        layers.append(MMFSDecoderLayer(layer, Synchronizer(config, index // config.mmfs_every) if wanted else None))
    model.layers = nn.ModuleList(layers)
    model.norm = RMSNorm.of(model.norm)
    return model


def synchronizers(model: PreTrainedModel) -> list[Synchronizer]:
    """The synchronizers of a language model, in the order of their layers."""
    return [layer.synchronizer for layer in model.layers if layer.synchronizer is not None]


def image_memory(config: MMInterleavedConfig, pyramid: list[Tensor]) -> ImageMemory:
    """The levels that the decoder reads, out of a pyramid of maps [pictures, width, side, side]."""
    maps = [m for m in pyramid if m.shape[-1] in config.mmfs.levels]
    features = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
    return ImageMemory(features, [(m.shape[-2], m.shape[-1]) for m in maps])
