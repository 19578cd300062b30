"""Operators of a decode step: products of few rows with large matrices, and attention over the KV cache.

Every function has a reference implementation in PyTorch and a Triton kernel (`decoding_triton.py`), which fuses norm,
bias, residual and activation with the product. With few rows the speed is limited by reading weights, keys and values
once.

    project         [norm] -> one or several linear layers -> [+ residual]; weights may have 8 bits, with scales
    project_gated   norm -> silu(gate) * up
    attend          rotary positions, write of the new key and value into the KV cache, attention over the row's columns

Nothing here waits for the device or depends on values on it, so all of it can be captured in a CUDA graph.

Axes: B rows, L columns of the KV cache, N heads, K key heads, D width of a row, H width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .deformable import promote
from .mmfs_attention import HAS_TRITON, KERNEL_DTYPES, on_triton
from .scaled_rows import Weights

Backend = Literal["plain", "triton"]

MOST_ROWS = 16  # most rows that the product kernels multiply with a matrix at a time
WIDEST_HEAD = 256


def _linear(x: Tensor, weight: Weights, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight if isinstance(weight, Tensor) else weight.widened(x.dtype), bias)


def why_not_kernels(x: Tensor, head_dim: int) -> str | None:
    """Why the Triton kernels cannot run on hidden states like `x` [B, D]; None: they can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if not on_triton(x.device):
        return f"the kernels are for CUDA devices, and the model is on {x.device}"
    if x.dtype not in KERNEL_DTYPES:
        return f"the kernels support {', '.join(str(d) for d in KERNEL_DTYPES)}, not {x.dtype}"
    if head_dim > WIDEST_HEAD or head_dim % 2:
        return f"heads have {head_dim} channels; the kernels support even numbers up to {WIDEST_HEAD}"
    return None


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / rms(x) * gain. As in transformers the result is rounded to the type of `x` before the gain."""
    work = x.to(promote(x.dtype))
    return gain * (work * torch.rsqrt(work.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def project(
    x: Tensor,
    weights: Sequence[Weights],
    biases: Sequence[Tensor | None] | None = None,
    *,
    gain: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    backend: Backend = "plain",
) -> Tensor:
    """The outputs of several linear layers of one input, concatenated: [B, sum of outputs].

    Args:
        x: [B, D]; at most `MOST_ROWS` rows for the kernel.
        weights: [outputs, D] each; at most 3, all plain or all `ScaledRows`.
        biases: [outputs] or None each; None: no biases.
        gain: [D] of an RMS norm before the layers; None: no norm.
        eps: of the norm.
        residual: [B, outputs] added to the result.
        backend: "triton" rounds once, at the end.
    """
    biases = [None] * len(weights) if biases is None else biases
    if backend == "triton":
        from .decoding_triton import project as fused

        return fused(x, weights, biases, gain, eps, residual)
    x = x if gain is None else rms_norm(x, gain, eps)
    out = torch.cat([_linear(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=-1)
    return out if residual is None else residual + out


def project_gated(
    x: Tensor, gate: Weights, up: Weights, *, gain: Tensor, eps: float, backend: Backend = "plain"
) -> Tensor:
    """silu(norm(x) gate^T) * (norm(x) up^T): [B, outputs]; `gate`, `up` [outputs, D], `gain` [D]."""
    if backend == "triton":
        from .decoding_triton import project_gated as fused

        return fused(x, gate, up, gain, eps)
    x = rms_norm(x, gain, eps)
    return F.silu(_linear(x, gate)) * _linear(x, up)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    scale: float,
    source: Tensor | None = None,
    *,
    backend: Backend = "plain",
) -> Tensor:
    """Write the new key and value of each row into the KV cache, and attend from the new token to its row.

    Args:
        query: [B, N * H] before rotary positions.
        key, value: [B, K * H] of the new tokens, `key` before rotary positions; K key heads.
        cos, sin: [B, H] of the positions of the new tokens.
        keys, values: [B, K, L, H] the KV cache; keys after rotary positions. The new token of row b is written into
            column `columns[b]` of row b.
        columns: [B] int64, the column of each new token. A row attends to the columns up to its own.
        scale: factor of the scores.
        source: [B, L] int64, the row of `keys` and `values` that holds a column of row b, so that beams share columns;
            None: every row holds its own columns.

    Returns:
        [B, N * H].
    """
    if backend == "triton":
        from .decoding_triton import attend as fused

        return fused(query, key, value, cos, sin, keys, values, columns, scale, source)
    rows, key_heads, capacity, dim = keys.shape
    query, key = (rotate(x.unflatten(-1, (-1, dim)), cos[:, None], sin[:, None]) for x in (query, key))
    own, place = torch.arange(rows, device=keys.device), torch.arange(capacity, device=keys.device)
    keys[own, :, columns] = key
    values[own, :, columns] = value.unflatten(-1, (-1, dim))
    found = [keys, values] if source is None else [x[source, :, place].transpose(1, 2) for x in (keys, values)]
    mask = (place <= columns[:, None])[:, None, None]
    grouped = query.shape[1] != key_heads
    out = F.scaled_dot_product_attention(query[:, :, None], *found, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.reshape(rows, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) in transformers' half-split layout; `x`, `cos` and `sin` are [..., H]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
