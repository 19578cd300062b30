"""Triton kernels of `decoding.py`: few rows times large matrices, and one query a row over the KV cache.

A program of a product owns some outputs and reads their weights once, in pieces of full rows; threads are reduced once,
at the end. One row is multiplied elementwise; several rows use tensor cores, with the weights as the left operand. An
RMS norm needs no pass of its own: the gain is multiplied in before the product and the factor after it.

Attention splits the columns over several programs, as Flash-Decoding does; a small kernel combines them.

Axes: B rows, L columns of the KV cache, N heads, K key heads, D width of a row, H width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .overlap import overlap
from .scaled_rows import Weights
from .typed_triton import cdiv, jit, next_power_of_2

# Outputs, inputs and warps of a program: for one layer and several layers of one row, for gate and up, and for several
# rows. Chosen on an H200 at the release's size. There one row reaches 94 to 98 % of the copy bandwidth, and 68 to 76 %
# with 8-bit weights, which take more instructions.
TILE = {"map": (8, 512, 4), "maps": (8, 1024, 4), "gated": (4, 1024, 4), "rows": (32, 256, 4),
        "map of bytes": (8, 512, 8), "maps of bytes": (16, 512, 4), "gated of bytes": (8, 512, 4)}  # fmt: skip
MANY_PROGRAMS = 2048  # attention is split into about so many programs if rows and heads are fewer
MOST_SPLITS = 32
COLUMNS = 64  # columns of the KV cache in a tile of attention


@jit
def _weights(start, k, real, INPUTS: tl.constexpr):
    """Columns `k` of the rows that begin at `start`. Weights are read once, so they are evicted first."""
    inside = real[:, None] & (k < INPUTS)[None, :]
    return tl.load(start[:, None] + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")


@jit
def _widened(w):
    """Weights in float32.

    An 8-bit integer becomes the last bits of the float 2^23 + 128 + w, because a GPU converts integers at an eighth of
    the rate of its other instructions.
    """
    if w.dtype == tl.int8:
        bits = (w.to(tl.uint8, bitcast=True) ^ 128).to(tl.int32) | 0x4B000000
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    return w.to(tl.float32)


@jit
def _normed(x, gain, k, INPUTS: tl.constexpr, NORM: tl.constexpr):
    """Columns `k` of one row, before and after the gain of its norm, in float32."""
    piece = tl.load(x + k, mask=k < INPUTS, other=0.0).to(tl.float32)
    if NORM:
        return piece, piece * tl.load(gain + k, mask=k < INPUTS, other=0.0).to(tl.float32)
    return piece, piece


@jit
def _one_row_sums(x, start, gain, real, eps, INPUTS: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """norm(x) weight^T of a single row: [BLOCK_N, 1]. The next piece of the weights is always being loaded."""
    lane = tl.arange(0, BLOCK_K)
    wide = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_K], tl.float32)
    w = _weights(start, lane, real, INPUTS)
    if OVERLAP:  # weights do not depend on the previous kernel, which may still be running; everything else does
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    for first in range(0, INPUTS, BLOCK_K):
        ahead = _weights(start, first + BLOCK_K + lane, real, INPUTS)
        piece, scaled = _normed(x, gain, first + lane, INPUTS, NORM)
        square += piece * piece
        wide += _widened(w) * scaled[None, :]
        w = ahead
    acc = tl.sum(wide, axis=1)
    if NORM:
        acc = acc / tl.sqrt(tl.sum(square, axis=0) / INPUTS + eps)
    return acc[:, None]


@jit
def _several_rows_sums(x, start, gain, real, rows, x_row, eps, INPUTS: tl.constexpr, NORM: tl.constexpr,
                       ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                       OVERLAP: tl.constexpr):  # fmt: skip
    """norm(x) weight^T of several rows by tensor cores: [BLOCK_N, ROWS]."""
    lane, line = tl.arange(0, BLOCK_K), tl.arange(0, ROWS)
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    square = tl.zeros([ROWS, BLOCK_K], tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    for first in range(0, INPUTS, BLOCK_K):
        k = first + lane
        w = _weights(start, k, real, INPUTS)
        given = (line < rows)[:, None] & (k < INPUTS)[None, :]
        piece = tl.load(x + line[:, None] * x_row + k[None, :], mask=given, other=0.0).to(tl.float32)
        if NORM:
            square += piece * piece
            piece = piece * tl.load(gain + k, mask=k < INPUTS, other=0.0).to(tl.float32)[None, :]
        work = x.dtype.element_ty  # represents 8-bit integers and floats exactly
        acc = tl.dot(_widened(w).to(work), tl.trans(piece.to(work)), acc, input_precision="ieee")
    if NORM:
        acc = acc / tl.sqrt(tl.sum(square, axis=1) / INPUTS + eps)[None, :]
    return acc


@jit
def _row_sums(x, weight, scale, gain, own, outputs, rows, x_row, eps,
              INPUTS: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """norm(x) weight^T for the outputs `own`: [BLOCK_N, ROWS] float32; ROWS is 1 or 16."""
    start, real = weight + own.to(tl.int64) * INPUTS, own < outputs
    if ROWS == 1:
        acc = _one_row_sums(x, start, gain, real, eps, INPUTS, NORM, BLOCK_N, BLOCK_K, OVERLAP)
    else:
        acc = _several_rows_sums(x, start, gain, real, rows, x_row, eps, INPUTS, NORM, ROWS, BLOCK_N, BLOCK_K, OVERLAP)
    if SCALED:
        acc = acc * tl.load(scale + own, mask=real, other=0.0).to(tl.float32)[:, None]
    return acc


@jit
def _one_map(x, weight, scale, bias, gain, residual, out, block, column, outputs, all_outputs, rows, x_row, eps,
             INPUTS: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
             RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
             OVERLAP: tl.constexpr):  # fmt: skip
    """Some outputs of one layer, stored into the columns of `out` from `column` on."""
    own = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _row_sums(x, weight, scale, gain, own, outputs, rows, x_row, eps, INPUTS, NORM, SCALED, ROWS, BLOCK_N,
                    BLOCK_K, OVERLAP)  # fmt: skip
    if BIAS:
        acc += tl.load(bias + own, mask=own < outputs, other=0.0).to(tl.float32)[:, None]
    line = tl.arange(0, ROWS)
    place = line[None, :] * all_outputs + (column + own)[:, None]
    wanted = (own < outputs)[:, None] & (line < rows)[None, :]
    if RESIDUAL:
        acc += tl.load(residual + place, mask=wanted, other=0.0).to(tl.float32)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=wanted)


@jit
def _project_kernel(
    x, weight0, weight1, weight2, scale0, scale1, scale2, bias0, bias1, bias2, gain, residual, out,
    size0, size1, size2, blocks0, blocks1, rows, x_row, eps,
    INPUTS: tl.constexpr, MAPS: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    # A branch for each layer instead of selected pointers: the compiler uses wide loads only for aligned pointers.
    block = tl.program_id(0)
    every = size0 + size1 + size2
    if MAPS == 1 or block < blocks0:
        _one_map(x, weight0, scale0, bias0, gain, residual, out, block, 0, size0, every, rows, x_row, eps,
                 INPUTS, NORM, SCALED, BIAS, RESIDUAL, ROWS, BLOCK_N, BLOCK_K, OVERLAP)  # fmt: skip
    elif MAPS == 2 or block < blocks0 + blocks1:
        _one_map(x, weight1, scale1, bias1, gain, residual, out, block - blocks0, size0, size1, every, rows, x_row, eps,
                 INPUTS, NORM, SCALED, BIAS, RESIDUAL, ROWS, BLOCK_N, BLOCK_K, OVERLAP)  # fmt: skip
    else:
        _one_map(x, weight2, scale2, bias2, gain, residual, out, block - blocks0 - blocks1, size0 + size1, size2, every,
                 rows, x_row, eps, INPUTS, NORM, SCALED, BIAS, RESIDUAL, ROWS, BLOCK_N, BLOCK_K, OVERLAP)  # fmt: skip


@jit
def _gated_kernel(
    x, gate, up, gate_scale, up_scale, gain, out, outputs, rows, x_row, eps,
    INPUTS: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    own = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    a = _row_sums(x, gate, gate_scale, gain, own, outputs, rows, x_row, eps, INPUTS, True, SCALED, ROWS, BLOCK_N,
                  BLOCK_K, OVERLAP)  # fmt: skip
    b = _row_sums(x, up, up_scale, gain, own, outputs, rows, x_row, eps, INPUTS, True, SCALED, ROWS, BLOCK_N,
                  BLOCK_K, OVERLAP)  # fmt: skip
    line = tl.arange(0, ROWS)
    wanted = (own < outputs)[:, None] & (line < rows)[None, :]
    result = a / (1.0 + tl.exp(-a)) * b
    tl.store(out + line[None, :] * outputs + own[:, None], result.to(out.dtype.element_ty), mask=wanted)


def _tile(kind: str, x: Tensor, scaled: bool) -> dict[str, Any]:
    """Launch options of a product of `x` by its kind in `TILE`. With several rows overlap was measured to be slower."""
    several = len(x) > 1
    block_n, block_k, warps = TILE["rows" if several else f"{kind} of bytes" if scaled else kind]
    begins = {"OVERLAP": False} if several else overlap(x.device)
    return {"ROWS": 16 if several else 1, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, **begins}


def _parts(weights: Sequence[Weights], nothing: Tensor) -> tuple[list[Tensor], list[Tensor], bool]:
    """Matrices, scales, and whether there are scales; `nothing` is the placeholder of a missing scale."""
    matrices, scales = [], []
    for w in weights:
        matrices.append((w if isinstance(w, Tensor) else w.data).contiguous())
        scales.append(nothing if isinstance(w, Tensor) else w.scale.contiguous())
    return matrices, scales, not isinstance(weights[0], Tensor)


def project(
    x: Tensor,
    weights: Sequence[Weights],
    biases: Sequence[Tensor | None],
    gain: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    """See `decoding.project`."""
    rows, inputs = x.shape
    sizes = [len(w) for w in weights] + [0] * (3 - len(weights))
    tile = _tile("map" if len(weights) == 1 else "maps", x, not isinstance(weights[0], Tensor))
    blocks = [cdiv(size, tile["BLOCK_N"]) for size in sizes]
    out = x.new_empty(rows, sum(sizes))
    nothing = x  # placeholder for pointers that the kernel does not read
    if any(b is not None for b in biases):
        biases = [x.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
    pad = [nothing] * (3 - len(weights))
    matrices, scales, scaled = _parts(weights, nothing)
    with torch.cuda.device_of(x):
        _project_kernel[(sum(blocks),)](
            x, *matrices, *pad, *scales, *pad, *(nothing if b is None else b for b in biases), *pad,
            nothing if gain is None else gain, nothing if residual is None else residual.contiguous(), out,
            *sizes, *blocks[:2], rows, x.stride(0), eps,
            INPUTS=inputs, MAPS=len(weights), NORM=gain is not None, SCALED=scaled, BIAS=biases[0] is not None,
            RESIDUAL=residual is not None, **tile,
        )  # fmt: skip
    return out


def project_gated(x: Tensor, gate: Weights, up: Weights, gain: Tensor, eps: float) -> Tensor:
    """See `decoding.project_gated`."""
    rows, inputs = x.shape
    tile = _tile("gated", x, not isinstance(gate, Tensor))
    out = x.new_empty(rows, len(gate))
    matrices, scales, scaled = _parts([gate, up], x)
    with torch.cuda.device_of(x):
        _gated_kernel[(cdiv(len(gate), tile["BLOCK_N"]),)](
            x, *matrices, *scales, gain, out, len(gate), rows, x.stride(0), eps, INPUTS=inputs, SCALED=scaled, **tile
        )  # fmt: skip
    return out


@jit
def _rotated(x, cos, sin, d, real, DIM: tl.constexpr):
    """One head after rotary positions."""
    half: tl.constexpr = DIM // 2
    other = tl.where(d < half, d + half, d - half)
    a = tl.load(x + d, mask=real, other=0.0).to(tl.float32)
    b = tl.load(x + other, mask=real, other=0.0).to(tl.float32)
    c = tl.load(cos + d, mask=real, other=0.0).to(tl.float32)
    s = tl.load(sin + d, mask=real, other=0.0).to(tl.float32)
    return a * c + tl.where(d < half, -b, b) * s


@jit
def _attend_kernel(
    query, key, value, cos, sin, keys, values, columns, source, parts, sums, tops,
    capacity, query_row, key_row, value_row, cos_row, sin_row, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    KEY_HEADS: tl.constexpr = HEADS // GROUP
    row, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    split, key_head = tl.program_id(1), head // GROUP
    now = tl.load(columns + row)
    span = tl.cdiv(tl.cdiv(now + 1, SPLITS), BLOCK_C) * BLOCK_C
    d = tl.arange(0, BLOCK_D)
    real = d < DIM
    q = _rotated(query + row * query_row + head * DIM, cos + row * cos_row, sin + row * sin_row, d, real, DIM)
    q = q.to(keys.dtype.element_ty).to(tl.float32) * scale

    top = tl.full([], -1.0e30, tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    end = tl.minimum((split + 1) * span, now)
    first = split * span
    while first < end:
        place = first + tl.arange(0, BLOCK_C)
        seen = place < end
        if SHARED:
            holder = tl.load(source + row * capacity + place, mask=seen, other=0)
        else:
            holder = tl.zeros([BLOCK_C], tl.int64) + row
        start = ((holder * KEY_HEADS + key_head) * capacity + place) * DIM
        wanted = seen[:, None] & real[None, :]
        k = tl.load(keys + start[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        v = tl.load(values + start[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(k * q[None, :], axis=1), -1.0e30)
        higher = tl.maximum(top, tl.max(score, axis=0))
        share = tl.where(seen, tl.exp(score - higher), 0.0)
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(share, axis=0)
        acc = acc * shrink + tl.sum(share[:, None] * v, axis=0)
        top = higher
        first += BLOCK_C

    if now // span == split:  # the new token belongs to this split
        k = _rotated(key + row * key_row + key_head * DIM, cos + row * cos_row, sin + row * sin_row, d, real, DIM)
        k = k.to(keys.dtype.element_ty)
        v = tl.load(value + row * value_row + key_head * DIM + d, mask=real, other=0.0)
        if head % GROUP == 0:
            start = ((row.to(tl.int64) * KEY_HEADS + key_head) * capacity + now) * DIM
            tl.store(keys + start + d, k, mask=real)
            tl.store(values + start + d, v, mask=real)
        score = tl.sum(k.to(tl.float32) * q, axis=0)
        higher = tl.maximum(top, score)
        share = tl.exp(score - higher)
        shrink = tl.exp(top - higher)
        total = total * shrink + share
        acc = acc * shrink + share * v.to(tl.float32)
        top = higher
    index = tl.program_id(0) * SPLITS + split
    tl.store(parts + index * DIM + d, acc, mask=real)
    tl.store(sums + index, total)
    tl.store(tops + index, top)


@jit
def _join_kernel(parts, sums, tops, out, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
                 OVERLAP: tl.constexpr):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    index = tl.program_id(0)
    split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    top = tl.load(tops + index * SPLITS + split)
    share = tl.exp(top - tl.max(top, axis=0))
    total = tl.sum(share * tl.load(sums + index * SPLITS + split), axis=0)
    place = (index * SPLITS + split)[:, None] * DIM + d[None, :]
    part = tl.load(parts + place, mask=(d < DIM)[None, :], other=0.0)
    mixed = tl.sum(share[:, None] * part, axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + index * DIM + d, mixed.to(out.dtype.element_ty), mask=d < DIM)


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
    source: Tensor | None,
) -> Tensor:
    """See `decoding.attend`."""
    rows, key_heads, capacity, dim = keys.shape
    heads = query.shape[1] // dim
    splits = min(MOST_SPLITS, next_power_of_2(cdiv(MANY_PROGRAMS, rows * heads)))
    parts = torch.empty(rows * heads, splits, dim, dtype=torch.float32, device=query.device)
    sums, tops = (torch.empty(rows * heads, splits, dtype=torch.float32, device=query.device) for _ in range(2))
    out = torch.empty(rows, heads * dim, dtype=query.dtype, device=query.device)
    block_d = next_power_of_2(dim)
    with torch.cuda.device_of(query):
        _attend_kernel[(rows * heads, splits)](
            query, key, value, cos, sin, keys, values, columns, columns if source is None else source,
            parts, sums, tops,
            capacity, query.stride(0), key.stride(0), value.stride(0), cos.stride(0), sin.stride(0), scale,
            HEADS=heads, GROUP=heads // key_heads, DIM=dim, SPLITS=splits, SHARED=source is not None,
            BLOCK_C=max(COLUMNS * 128 // max(block_d, 128), 16), BLOCK_D=block_d, **overlap(query.device),
        )  # fmt: skip
        _join_kernel[(rows * heads,)](
            parts, sums, tops, out, DIM=dim, SPLITS=splits, BLOCK_D=block_d, **overlap(query.device)
        )
    return out
