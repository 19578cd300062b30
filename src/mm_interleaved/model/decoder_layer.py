"""One layer of the language model, for training, prefill and decode steps.

The layer takes over the parts of a transformers decoder layer (Llama, Mistral, Qwen2 or Qwen3). Every k-th layer also
has a synchronizer:

    x = x + self_attention(norm(x))
    x = x + tanh(gate) * MMFS(norm(x), norm(maps))        in layers 0, k, 2k, ...
    x = x + mlp(norm(x))

It computes the same as the library's layer from the same weights, but may run other kernels: `fused.py` chooses those
of linear layers, `Attention` those of the KV cache.

Axes: B batch, L new tokens, D width, N heads, K key heads, H width of a head.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    eager_attention_forward,
)
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer, MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP

from ..ops import attend, rotary, silu_gate
from .fused import add_linear, gated, kernels_for, linears
from .kv_cache import KVCache
from .mmfs import VisibleImages
from .rms_norm import RMSNorm
from .synchronizer import ImageFeatures, Synchronizer
from .weights import is_intercepted

LibraryAttention = LlamaAttention | MistralAttention | Qwen2Attention | Qwen3Attention
LibraryMLP = LlamaMLP | MistralMLP | Qwen2MLP | Qwen3MLP
LibraryDecoderLayer = LlamaDecoderLayer | MistralDecoderLayer | Qwen2DecoderLayer | Qwen3DecoderLayer


class Attention(nn.Module):
    """Self-attention with rotary positions. It takes over the parts of the library's attention under the same names."""

    is_causal = True

    def __init__(self, attention: LibraryAttention) -> None:
        super().__init__()
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.num_key_value_groups = attention.num_key_value_groups  # read by the library's attention functions
        self.attention_dropout = attention.attention_dropout
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj = attention.o_proj
        self.q_norm = self.k_norm = None
        if hasattr(attention, "q_norm"):  # Qwen3
            norms = cast(Qwen3Attention, attention)
            self.q_norm, self.k_norm = RMSNorm.of(norms.q_norm), RMSNorm.of(norms.k_norm)
        owner = self.config if self.config.model_type == "mistral" else attention
        self.window: int | None = getattr(owner, "sliding_window", None)
        self.train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Self-attention of `hidden_states`.

        Args:
            hidden_states: [B, L, D].
            position_embeddings: cos and sin, [B or 1, L, H] each.
            attention_mask: as the library's decoder makes it; ignored with a `KVCache`.
            past_key_values: a cache to read and extend; None: none.
            norm: applied to `hidden_states` first; None: no norm.
            residual: [B, L, D], added to the result; None: nothing.
            **kwargs: arguments that the library's decoder passes to its attention functions.

        Returns:
            [B, L, D].
        """
        query, key, value = linears(hidden_states, (self.q_proj, self.k_proj, self.v_proj), norm)
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key, value))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if isinstance(past_key_values, KVCache):
            mixed = self._attend_cache(query, key, value, position_embeddings, past_key_values)
        else:
            query, key = rotary(query, key, *position_embeddings)
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
            name = self.config._attn_implementation or "eager"
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
            mixed, _ = interface(
                self, query, key, value, attention_mask, scaling=self.scaling, sliding_window=self.window,
                dropout=self.attention_dropout if self.training else 0.0, **kwargs,
            )  # fmt: skip
        mixed = mixed.reshape(*hidden_states.shape[:-1], -1)
        return self.o_proj(mixed) if residual is None else add_linear(residual, mixed, self.o_proj)

    def _attend_cache(
        self, query: Tensor, key: Tensor, value: Tensor, position_embeddings: tuple[Tensor, Tensor], cache: KVCache
    ) -> Tensor:
        """Attention over the KV cache [B, L, N, H], of `query`, `key`, `value` [B, L, heads, H] without positions."""
        layer, place = cache.layers[self.layer_idx], cache.placement
        single = query.shape[1] == 1 and place.rows is None and self.window is None
        if single and layer.is_initialized and kernels_for(query[:, 0], self.head_dim):
            cos, sin = (x[:, 0].expand(len(query), -1) for x in position_embeddings)
            q, k, v = (x[:, 0].flatten(1) for x in (query, key, value))
            mixed = attend(q, k, v, cos, sin, layer.keys, layer.values, place.columns[:, 0], self.scaling, cache.source,
                           backend="triton")  # fmt: skip
            return mixed.unflatten(-1, (-1, self.head_dim))[:, None]
        query, key = rotary(query, key, *position_embeddings)
        keys, values = cache.update(key.transpose(1, 2), value.transpose(1, 2), self.layer_idx)
        return cache.attention(query.transpose(1, 2), keys, values, self.scaling, self.window).transpose(1, 2)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)). It takes over the parts of the library's MLP under the same names."""

    def __init__(self, mlp: LibraryMLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )
        self.is_swiglu = mlp.config.hidden_act == "silu"
        self.train(mlp.training)

    @property
    def _joins_gate(self) -> bool:
        """Whether one kernel may compute the activation and the product with it."""
        return self.is_swiglu and not is_intercepted(self.act_fn)

    def forward(self, hidden_states: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """The MLP of `hidden_states` [B, L, D]; `norm` and `residual` as in `Attention.forward`."""
        inner = None
        if norm is not None and self._joins_gate:
            inner = gated(hidden_states, self.gate_proj, self.up_proj, norm)
        if inner is None:
            hidden_states = hidden_states if norm is None else norm(hidden_states)
            gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
            inner = silu_gate(gate, up) if self._joins_gate else self.act_fn(gate) * up
        return self.down_proj(inner) if residual is None else add_linear(residual, inner, self.down_proj)


def add_block(hidden: Tensor, block: Attention | GatedMLP, norm: RMSNorm, **kwargs: Any) -> Tensor:
    """hidden + block(norm(hidden)), [B, L, D].

    The block computes norm and sum itself if a kernel can fuse them with its linear layers. A hook on the block gets
    the usual input and output, without norm and sum.
    """
    if is_intercepted(block):
        return hidden + block(norm(hidden), **kwargs)
    return block(hidden, norm=norm, residual=hidden, **kwargs)


class MMFSDecoderLayer(GradientCheckpointingLayer):
    """The parts of a library's decoder layer, with an optional synchronizer between attention and MLP."""

    def __init__(self, layer: LibraryDecoderLayer, synchronizer: Synchronizer | None) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.self_attn, self.mlp = Attention(layer.self_attn), GatedMLP(layer.mlp)
        self.input_layernorm = RMSNorm.of(layer.input_layernorm)
        self.post_attention_layernorm = RMSNorm.of(layer.post_attention_layernorm)
        self.synchronizer = synchronizer
        if hasattr(layer, "attention_type"):  # read by the models that mix kinds of attention
            self.attention_type = layer.attention_type

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass.

        Never without gradients: nothing is recomputed then, and the library would drop the KV cache.
        """
        return self._checkpoints and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self._checkpoints = on

    def forward(self, hidden_states: Tensor, *, images: ImageFeatures, visible: VisibleImages, **kwargs: Any) -> Tensor:
        """The layer's output [B, L, D].

        Args:
            hidden_states: [B, L, D].
            images: features of the images.
            visible: the visible images of each token; a group is one token.
            **kwargs: the library's arguments for its attention.
        """
        hidden = add_block(hidden_states, self.self_attn, self.input_layernorm, **kwargs)
        if self.synchronizer is not None:
            hidden = self.synchronizer(hidden, images, visible)
        return add_block(hidden, self.mlp, self.post_attention_layernorm)
