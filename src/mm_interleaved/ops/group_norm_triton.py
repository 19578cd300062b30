"""The Triton kernels of `group_norm.py`, with the same arguments.

A map is read as rows of C channels, one row for each pixel of each image. A program processes a block of channels for
some neighbouring pixels of one image, a tile at a time, independently of the groups. Its sums are by channel and are
written to a small table [2, B, parts, C]; only the kernel that combines the parts uses groups. There are no atomic
additions, so results are deterministic.

Axes: B batch, C channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .typed_triton import cdiv, jit, next_power_of_2

TILE, WIDEST = 2048, 64  # elements of a tile, 16 a thread with 4 warps; its most channels, 128 bytes in half precision
PROGRAMS = 4096  # most programs for a map, some 30 for each multiprocessor of an H200
JOINED = 2048  # entries of the table that are combined at a time, 8 a thread with 8 warps


@jit
def _block(pixels, channels, span, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels of a program, and the rows and memory offsets of its first tile."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(1) * span + tl.arange(0, BLOCK_N)[:, None]
    place = (tl.program_id(2).to(tl.int64) * pixels + row) * channels + channel[None, :]
    return channel, row, place


@jit
def _pair(table, channel, channels, width):
    """The two numbers in a table [2, B, groups] for the group of every channel."""
    groups = channels // width
    place = table + tl.program_id(2) * groups + channel // width
    first = tl.load(place, mask=channel < channels, other=0.0)
    return first, tl.load(place + tl.num_programs(2) * groups, mask=channel < channels, other=0.0)


@jit
def _affine(weight, bias, channel, channels):
    inside = channel < channels
    gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    return gain, tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)


@jit
def _note(table, first, second, channel, channels):
    """Write two numbers for every channel of a program to a table [2, B, parts, C]."""
    parts = tl.num_programs(1)
    place = table + (tl.program_id(2) * parts + tl.program_id(1)) * channels + channel
    tl.store(place, first, mask=channel < channels)
    tl.store(place + tl.num_programs(2) * parts * channels, second, mask=channel < channels)


@jit
def _statistics_kernel(x, table, pixels, channels, span, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of every channel, computed around the mean of the first tile for precision."""
    channel, row, place = _block(pixels, channels, span, BLOCK_N, BLOCK_C)
    count = tl.minimum(span, pixels - tl.program_id(1) * span)
    known = (channel < channels)[None, :]
    tile = tl.load(x + place, mask=(row < pixels) & known, other=0.0).to(tl.float32)
    shift = tl.sum(tile, axis=0) / tl.minimum(count, BLOCK_N)
    sums, squares = tl.zeros([BLOCK_N, BLOCK_C], tl.float32), tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    step = 0
    while step < span:
        inside = (row + step < pixels) & known
        tile = tl.load(x + place + step * channels, mask=inside, other=0.0).to(tl.float32)
        off = tl.where(inside, tile - shift[None, :], 0.0)
        sums += off
        squares += off * off
        step += BLOCK_N
    moved = tl.sum(sums, axis=0) / count
    _note(table, shift + moved, tl.sum(squares, axis=0) - moved * moved * count, channel, channels)


@jit
def _join_kernel(table, stats, pixels, channels, width, span, parts, eps, BLOCK_P: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    """Mean and reciprocal deviation of one group, combined from the parts of its channels (Chan et al. 1979)."""
    group, groups, image, images = tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.num_programs(1)
    part, d = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_D)[None, :]
    table += image * parts * channels + group * width
    shift = tl.load(table)
    sums = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    step = 0
    while step < parts:
        inside = (part + step < parts) & (d < width)
        mean = tl.load(table + (part + step) * channels + d, mask=inside, other=0.0)
        count = tl.minimum(span, pixels - (part + step) * span)
        sums += tl.where(inside, (mean - shift) * count, 0.0)
        step += BLOCK_P
    size = pixels * width
    middle = shift + tl.sum(tl.sum(sums, axis=1), axis=0) / size
    squares = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    step = 0
    while step < parts:
        inside = (part + step < parts) & (d < width)
        place = table + (part + step) * channels + d
        off = tl.load(place, mask=inside, other=0.0) - middle
        within = tl.load(place + images * parts * channels, mask=inside, other=0.0)
        count = tl.minimum(span, pixels - (part + step) * span)
        squares += tl.where(inside, within + off * off * count, 0.0)
        step += BLOCK_P
    variance = tl.maximum(tl.sum(tl.sum(squares, axis=1), axis=0) / size, 0.0)
    tl.store(stats + image * groups + group, middle)
    tl.store(stats + (images + image) * groups + group, tl.rsqrt(variance + eps))


@jit
def _norm_kernel(x, out, stats, weight, bias, pixels, channels, width, span, SILU: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    channel, row, place = _block(pixels, channels, span, BLOCK_N, BLOCK_C)
    mean, scale = _pair(stats, channel, channels, width)
    gain, offset = _affine(weight, bias, channel, channels)
    step = 0
    while step < span:
        inside = (row + step < pixels) & (channel < channels)[None, :]
        tile = tl.load(x + place + step * channels, mask=inside, other=0.0).to(tl.float32)
        y = (tile - mean[None, :]) * scale[None, :] * gain[None, :] + offset[None, :]
        if SILU:
            y *= tl.sigmoid(y)
        tl.store(out + place + step * channels, y, mask=inside)
        step += BLOCK_N


@jit
def _before_silu(grad, y, SILU: tl.constexpr):
    """The gradient before SiLU, if there is one: with s = sigmoid(y), d(y s) / dy = s (1 + y (1 - s))."""
    if SILU:
        s = tl.sigmoid(y)
        grad *= s * (1 + y * (1 - s))
    return grad


@jit
def _sums_kernel(grad, x, table, stats, weight, bias, pixels, channels, width, span, SILU: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """The sums of the gradient, and of the gradient times the normalised map, of every channel."""
    channel, row, place = _block(pixels, channels, span, BLOCK_N, BLOCK_C)
    mean, scale = _pair(stats, channel, channels, width)
    gain, offset = _affine(weight, bias, channel, channels)
    sums, products = tl.zeros([BLOCK_N, BLOCK_C], tl.float32), tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    step = 0
    while step < span:
        inside = (row + step < pixels) & (channel < channels)[None, :]
        tile = tl.load(x + place + step * channels, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(grad + place + step * channels, mask=inside, other=0.0).to(tl.float32)
        hat = (tile - mean[None, :]) * scale[None, :]
        d = _before_silu(d, hat * gain[None, :] + offset[None, :], SILU)
        sums += d
        products += d * hat
        step += BLOCK_N
    _note(table, tl.sum(sums, axis=0), tl.sum(products, axis=0), channel, channels)


@jit
def _gradient_kernel(grad, x, out, means, stats, weight, bias, pixels, channels, width, span, SILU: tl.constexpr,
                     BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """The gradient of the map: its components along 1 and along the normalised map (`means`) are subtracted."""
    channel, row, place = _block(pixels, channels, span, BLOCK_N, BLOCK_C)
    mean, scale = _pair(stats, channel, channels, width)
    along_one, along_hat = _pair(means, channel, channels, width)
    gain, offset = _affine(weight, bias, channel, channels)
    step = 0
    while step < span:
        inside = (row + step < pixels) & (channel < channels)[None, :]
        tile = tl.load(x + place + step * channels, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(grad + place + step * channels, mask=inside, other=0.0).to(tl.float32)
        hat = (tile - mean[None, :]) * scale[None, :]
        d = _before_silu(d, hat * gain[None, :] + offset[None, :], SILU) * gain[None, :]
        tl.store(out + place + step * channels, (d - along_one[None, :] - hat * along_hat[None, :]) * scale[None, :],
                 mask=inside)  # fmt: skip
        step += BLOCK_N


def _plan(x: Tensor) -> tuple[int, tuple[int, int, int], dict[str, Any]]:
    """Pixels of an image, the grid (blocks of channels, parts of an image, images), and block sizes."""
    batch, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    wide = min(WIDEST, next_power_of_2(channels))
    tall, blocks = TILE // wide, cdiv(channels, wide)
    span = tall * cdiv(cdiv(pixels, tall) * blocks * batch, PROGRAMS)
    return pixels, (blocks, cdiv(pixels, span), batch), {"span": span, "BLOCK_N": tall, "BLOCK_C": wide}


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> tuple[Tensor, Tensor]:
    """The result, channels last as `x`, and means and reciprocal deviations [2, B, groups]."""
    out, stats = torch.empty_like(x), x.new_empty((2, len(x), groups), dtype=torch.float32)
    if not x.numel():
        return out, stats
    pixels, grid, sizes = _plan(x)
    channels, parts, width = x.shape[1], grid[1], x.shape[1] // groups
    table = x.new_empty((2, len(x), parts, channels), dtype=torch.float32)
    deep = next_power_of_2(width)
    with torch.cuda.device_of(x):
        _statistics_kernel[grid](x, table, pixels, channels, **sizes)
        _join_kernel[(groups, len(x))](table, stats, pixels, channels, width, sizes["span"], parts, eps,
                                       BLOCK_P=max(1, JOINED // deep), BLOCK_D=deep, num_warps=8)  # fmt: skip
        _norm_kernel[grid](x, out, stats, weight, bias, pixels, channels, width, SILU=silu, **sizes)
    return out, stats


def group_norm_backward(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of `x`, and those of bias and weight for each image: [2, B, C]."""
    out, groups = torch.empty_like(x), stats.shape[2]
    if not x.numel():
        return out, stats.new_zeros((2, *x.shape[:2]))
    pixels, grid, sizes = _plan(x)
    channels, width = x.shape[1], x.shape[1] // groups
    table = stats.new_empty((2, len(x), grid[1], channels))
    shape = {"pixels": pixels, "channels": channels, "width": width, "SILU": silu, **sizes}
    with torch.cuda.device_of(x):
        _sums_kernel[grid](grad, x, table, stats, weight, bias, **shape)
        sums = table.sum(2)
        means = (sums * weight).unflatten(2, (groups, width)).sum(3) / (pixels * width)
        _gradient_kernel[grid](grad, x, out, means, stats, weight, bias, **shape)
    return out, sums
