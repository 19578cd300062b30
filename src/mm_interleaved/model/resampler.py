"""A query transformer: learned queries that read any number of feature vectors (BLIP-2's Q-Former, arXiv 2301.12597).

It stands at both ends of the language model: it turns the patches of an image into visual tokens, and the context
before an image into the conditions of the image decoder. Post-norm BERT layers without a text branch. With
`qk_norm`, queries and keys pass a LayerNorm over each head's channels, one set of weights for all heads.

The queries have batch size 1 until the first cross-attention spreads them over the batch.

Axes: B batch, Q queries, L feature vectors that are read, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .config import ResamplerConfig


class ResamplerAttention(nn.Module):
    """Attention of `query` on `context`, then projection, dropout, residual and LayerNorm."""

    def __init__(self, config: ResamplerConfig, context_size: int) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.hidden_size // config.num_heads
        self.num_heads, self.dropout = config.num_heads, config.attention_dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(context_size, width)
        self.v_proj = nn.Linear(context_size, width)
        self.q_norm = nn.LayerNorm(head_dim, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()
        self.out_proj = nn.Linear(width, width)
        self.out_dropout = nn.Dropout(config.hidden_dropout)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """`query` [B or 1, Q, D], `context` [B, L, size], `mask` [B, 1, 1, L] added."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = heads(self.q_proj(query)), heads(self.k_proj(context)), heads(self.v_proj(context))
        q = self.q_norm(q).expand(len(k), -1, -1, -1)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, self.k_norm(k), v, attn_mask=mask, dropout_p=dropout)
        return self.norm(query + self.out_dropout(self.out_proj(mixed.transpose(1, 2).flatten(2))))


class ResamplerLayer(GradientCheckpointingLayer):
    """Self-attention, in some layers cross-attention, and an MLP, each followed by residual and LayerNorm."""

    def __init__(self, config: ResamplerConfig, encoder_size: int, index: int) -> None:
        super().__init__()
        self.self_attention = ResamplerAttention(config, config.hidden_size)
        crosses = index % config.cross_attention_every == 0
        self.cross_attention = ResamplerAttention(config, encoder_size) if crosses else None
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, query: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        """One layer: [B or 1, Q, D] to [B, Q, D]."""
        query = self.self_attention(query, query)
        if self.cross_attention is not None:
            query = self.cross_attention(query, features, mask)
        return self.norm(query + self.dropout(self.fc2(F.gelu(self.fc1(query)))))


class Resampler(nn.Module):
    """`num_queries` vectors out of any number."""

    def __init__(self, config: ResamplerConfig, encoder_size: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([ResamplerLayer(config, encoder_size, i) for i in range(config.num_layers)])
        self.deviation = config.initializer_range
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """BERT's initialisation: normal weights, zero biases."""
        nn.init.normal_(self.queries, std=self.deviation)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.deviation)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read `features`.

        Args:
            features: [B, L, encoder_size].
            mask: [B, L], nonzero where there is something to read; None: everywhere.

        Returns:
            [B, num_queries, hidden_size].
        """
        if mask is not None:
            lowest = torch.finfo(features.dtype).min
            mask = torch.zeros(mask.shape, dtype=features.dtype, device=mask.device).masked_fill(mask == 0, lowest)
            mask = mask[:, None, None]
        query = self.dropout(self.norm(self.queries))
        for layer in self.layers:
            query = layer(query, features, mask)
        return query
