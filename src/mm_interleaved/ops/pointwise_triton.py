"""The Triton kernels of `pointwise.py`, with the same arguments.

Axes: B batch, L tokens, N heads, H width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .typed_triton import cdiv, jit, next_power_of_2

ELEMENTS = 1024  # of a gate in one program: 8 a thread with 4 warps, one load of 16 bytes
ROWS, COLUMNS = 4, 256  # of a gate's result in one program, if both halves are in one tensor
HEAD_ELEMENTS = 512  # half channels of the heads in one program: 8 a thread with 2 warps


@jit
def _turn(source, target, cos, sin, source_head, block, INVERSE: tl.constexpr, HEADS: tl.constexpr,
          HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Some heads of one token: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    head = block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < HEADS) & (channel < HALF)
    first = tl.load(source + head * source_head + channel, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + head * source_head + HALF + channel, mask=inside, other=0.0).to(tl.float32)
    angle = channel + 0 * head  # the same for every head, in the layout of the head's threads
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    place = target + head * (2 * HALF) + channel
    tl.store(place, first * c - second * s, mask=inside)
    tl.store(place + HALF, second * c + first * s, mask=inside)


@jit
def _rotary_kernel(query, key, query_out, key_out, cos, sin, length, query_batch, query_token, query_head,
                   key_batch, key_token, key_head, cos_batch, cos_token, sin_batch, sin_token,
                   INVERSE: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr,
                   BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Rotate BLOCK_H heads of one token: of the query in the first programs of axis 1, then of the key."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, column = token // length, token % length
    cos += batch * cos_batch + column * cos_token
    sin += batch * sin_batch + column * sin_token
    query_blocks: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    if block < query_blocks:
        _turn(query + batch * query_batch + column * query_token, query_out + token * (HEADS * 2 * HALF), cos, sin,
              query_head, block, INVERSE, HEADS, HALF, BLOCK_H, BLOCK_D)  # fmt: skip
    else:
        _turn(key + batch * key_batch + column * key_token, key_out + token * (KEY_HEADS * 2 * HALF), cos, sin,
              key_head, block - query_blocks, INVERSE, KEY_HEADS, HALF, BLOCK_H, BLOCK_D)  # fmt: skip


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """The query [B, L, N, H] and the key, rotated forwards or, with `inverse`, backwards."""
    query, key, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, cos, sin))
    batch, length, heads, dim = query.shape
    cos, sin = (x.expand(batch, -1, -1) for x in (cos, sin))
    turned = query.new_empty(query.shape), key.new_empty(key.shape)
    if not turned[0].numel():
        return turned
    wide = next_power_of_2(dim // 2)
    at_once = min(next_power_of_2(heads), max(1, HEAD_ELEMENTS // wide))
    blocks = cdiv(heads, at_once) + cdiv(key.shape[2], at_once)
    with torch.cuda.device_of(query):
        _rotary_kernel[(batch * length, blocks)](
            query, key, *turned, cos, sin, length, *query.stride()[:3], *key.stride()[:3], *cos.stride()[:2],
            *sin.stride()[:2], INVERSE=inverse, HEADS=heads, KEY_HEADS=key.shape[2], HALF=dim // 2, BLOCK_H=at_once,
            BLOCK_D=wide, num_warps=2,
        )  # fmt: skip
    return turned


@jit
def _gate_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, g * tl.sigmoid(g) * u, mask=inside)


@jit
def _gate_backward_kernel(grad, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr):
    """With s = sigmoid(g): d(g s u) = u s (1 + g (1 - s)) dg + g s du."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    d = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(grad_gate + place, d * u * s * (1 + g * (1 - s)), mask=inside)
    tl.store(grad_up + place, d * g * s, mask=inside)


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel():
        with torch.cuda.device_of(gate):
            _gate_kernel[(cdiv(out.numel(), ELEMENTS),)](gate, up, out, out.numel(), BLOCK=ELEMENTS)
    return out


def silu_gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to `gate` and `up`."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    found = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        with torch.cuda.device_of(gate):
            grid = (cdiv(gate.numel(), ELEMENTS),)
            _gate_backward_kernel[grid](grad, gate, up, *found, gate.numel(), BLOCK=ELEMENTS)
    return found


@jit
def _halves(both, count, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Both halves of a block, its places in a tensor of a half's width and of the full width, and which are real."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < count) & (column < width)
    wide = row * (2 * width) + column
    up = tl.load(both + wide, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(both + wide + width, mask=inside, other=0.0).to(tl.float32)
    return up, gate, row * width + column, wide, inside


@jit
def _normal(gate):
    """The cumulative normal distribution at `gate`."""
    return 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)


@jit
def _gelu_gate_kernel(both, out, count, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    up, gate, narrow, _, inside = _halves(both, count, width, BLOCK_R, BLOCK_C)
    tl.store(out + narrow, up * gate * _normal(gate), mask=inside)


@jit
def _gelu_gate_backward_kernel(grad, both, grad_both, count, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """With N the cumulative normal distribution: d(u g N(g)) = g N(g) du + u (N(g) + g N'(g)) dg."""
    up, gate, narrow, wide, inside = _halves(both, count, width, BLOCK_R, BLOCK_C)
    d = tl.load(grad + narrow, mask=inside, other=0.0).to(tl.float32)
    normal = _normal(gate)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(grad_both + wide, d * gate * normal, mask=inside)
    tl.store(grad_both + wide + width, d * up * (normal + gate * density), mask=inside)


def _launch_halves(kernel: Any, both: Tensor, *others: Tensor) -> None:
    """Launch with arguments `others[:-1]`, `both` and the result `others[-1]`."""
    width = both.shape[-1] // 2
    count = both.numel() // max(2 * width, 1)
    grid = (cdiv(count, ROWS), cdiv(width, COLUMNS))
    if both.numel():
        with torch.cuda.device_of(both):
            kernel[grid](*others[:-1], both, others[-1], count, width, BLOCK_R=ROWS, BLOCK_C=COLUMNS)


def gelu_gate(both: Tensor) -> Tensor:
    """The first half of the last dimension times gelu of the second."""
    both = both.contiguous()
    out = both.new_empty((*both.shape[:-1], both.shape[-1] // 2))
    _launch_halves(_gelu_gate_kernel, both, out)
    return out


def gelu_gate_backward(grad: Tensor, both: Tensor) -> Tensor:
    """Gradient to `both`."""
    both = both.contiguous()
    found = torch.empty_like(both)
    _launch_halves(_gelu_gate_backward_kernel, both, grad.contiguous(), found)
    return found
