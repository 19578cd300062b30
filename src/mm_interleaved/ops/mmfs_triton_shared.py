"""Shared by the Triton kernels of MMFS: the sample of a lane, block sizes, and the arguments of launches.

A lane is one (query, slot, point); see `mmfs_triton.py`.

Axes: I images, S spatial positions of all levels, Q queries, N heads, P points, V levels, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton.language as tl
from torch import Tensor

from .typed_triton import cdiv, jit, next_power_of_2

# Lanes of a program for heads of 64 channels; elements of its tile [lanes, D] per thread; most registers of a thread.
# If the compiler chooses the registers, the passes over many queries take 1.15 times as long on an H200.
TILES = {"forward": (32, 64, 168), "backward": (16, 32, 128), "backward of few": (64, 8, None)}
FEW_PROGRAMS = 1024  # below this many (query, head) pairs the kernels for few queries run
FIXED = ("HEADS", "POINTS", "DIM", "LEVELS", "HEIGHTS", "WIDTHS", "STARTS", "SCALES")  # constants of all kernels


@jit
def _block(images, rows, queries, slots, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
           ALL_SLOTS: tl.constexpr):  # fmt: skip
    """Row, slot within the block and point of every lane; the number of slots to process; an image of every query."""
    lane = tl.arange(0, BLOCK_Q * BLOCK_S * BLOCK_P)
    first = tl.program_id(0) * BLOCK_Q
    row = first + lane // (BLOCK_S * BLOCK_P)
    own = first + tl.arange(0, BLOCK_Q)
    every = tl.arange(0, ALL_SLOTS)
    real = (own < rows)[:, None] & (every < slots)[None, :]
    seen = tl.load(images + (own // queries)[:, None] * slots + every[None, :], mask=real, other=-1)
    last = tl.max(tl.max(tl.where(seen >= 0, every[None, :] + 1, 0), axis=1), axis=0)
    return row, lane // BLOCK_P % BLOCK_S, lane % BLOCK_P, last, tl.max(seen, axis=1)


@jit
def _image_of(images, row, slot, point, rows, queries, slots, POINTS: tl.constexpr):
    """The image of every lane, -1 where there is none."""
    real = (row < rows) & (slot < slots) & (point < POINTS)
    return tl.load(images + (row // queries) * slots + slot, mask=real, other=-1)


@jit
def _logit(logits, logit_table, row, slot, column, seen, logits_row, logit_table_row):
    """Logits of one level, -inf where a lane has no image."""
    own = tl.load(logits + row.to(tl.int64) * logits_row + column, mask=seen, other=0.0).to(tl.float32)
    added = tl.load(logit_table + slot * logit_table_row + column, mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, own + added, float("-inf"))


@jit
def _own_offset(offsets, row, column, real, offsets_row):
    """The query's part of the offset (x, y)."""
    place = offsets + row.to(tl.int64) * offsets_row + column
    return tl.load(place, mask=real, other=0.0).to(tl.float32), tl.load(place + 1, mask=real, other=0.0).to(tl.float32)


@jit
def _reference(reference, row, real, queries, reference_group, reference_query):
    """The reference point (x, y) of every lane."""
    place = reference + (row // queries) * reference_group + (row % queries) * reference_query
    return tl.load(place, mask=real, other=0.0).to(tl.float32), tl.load(place + 1, mask=real, other=0.0).to(tl.float32)


@jit
def _level(level, LEVELS: tl.constexpr, HEIGHTS: tl.constexpr, WIDTHS: tl.constexpr, STARTS: tl.constexpr,
           SCALES: tl.constexpr):  # fmt: skip
    """Height, width, first position and scale of a level. Not unrolled over levels, because registers would spill."""
    height, width, start, scale = HEIGHTS[0], WIDTHS[0], STARTS[0], SCALES[0]
    for other in tl.static_range(1, LEVELS):  # pyright: ignore[reportGeneralTypeIssues]  # compiled, not iterated
        height = tl.where(level == other, HEIGHTS[other], height)
        width = tl.where(level == other, WIDTHS[other], width)
        start = tl.where(level == other, STARTS[other], start)
        scale = tl.where(level == other, SCALES[other], scale)
    return height, width, start, scale


@jit
def _hat(distance):
    """The bilinear weight of a cell at that distance along one axis."""
    return tl.maximum(1.0 - tl.abs(distance), 0.0)


@jit
def _neighbours(place, size):
    """Two neighbouring cells along an axis: the first cell, the distance of the sample from it, the weights of both.

    The cells are clamped to the map, so that loads need no mask; outside of the map the weights are 0. In a map of one
    cell the second cell is the first again, with weight 0.
    """
    first = tl.maximum(tl.minimum(tl.floor(place), size - 2.0), 0.0)
    behind = place - first
    return first.to(tl.int32), behind, _hat(behind), tl.where(size > 1, _hat(behind - 1.0), 0.0)


@jit
def _channels(place, channel, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The channels of one cell for every lane: [lanes, channels]."""
    place = place[:, None] + channel[None, :]
    tile = tl.load(place) if DIM == BLOCK_D else tl.load(place, mask=(channel < DIM)[None, :], other=0.0)
    return tile.to(tl.float32)


@dataclass
class _Launch:
    """Arguments of a launch: the grid, the inputs in the layout of the kernels, sizes and strides."""

    grid: tuple[int, int]
    inputs: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    options: dict[str, Any]
    few: bool  # whether the kernels for few queries run


def _rows(x: Tensor) -> Tensor:
    """`x` [..., width] as [rows, width] with contiguous rows; a copy only if the strides require it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _whole_images(values: Tensor) -> Tensor:
    """`values` with contiguous images; a view of some of the levels is not copied."""
    _, _, heads, dim = values.shape
    return values if values.stride()[1:] == (heads * dim, dim, 1) else values.contiguous()


def tiles(kind: str, slots: int, points: int, dim: int) -> dict[str, int | None]:
    """Block sizes (powers of two), warps and registers of a launch of `kind`, a key of `TILES`."""
    lanes, a_thread, registers = TILES[kind]
    block_p, block_d = next_power_of_2(points), max(next_power_of_2(dim), 16)
    lanes = max(min(lanes * 64 // block_d, 128), block_p)
    block_q, block_s = lanes // block_p, 1
    if kind == "backward of few":
        block_q, block_s = 1, min(next_power_of_2(slots), lanes // block_p)
    warps = max(1, min(8, block_q * block_s * block_p * block_d // (32 * a_thread)))
    sizes = {"BLOCK_Q": block_q, "BLOCK_S": block_s, "BLOCK_P": block_p, "BLOCK_D": block_d}
    return {**sizes, "num_warps": warps, "maxnreg": registers}


@lru_cache(maxsize=1024)
def _options(
    kind: str,
    slots: int,
    heads: int,
    points: int,
    dim: int,
    shapes: tuple[int, ...],
    scales: tuple[float, ...],
) -> dict[str, Any]:
    """The constants of a launch, cached; the result must not be changed."""
    maps = list(zip(shapes[::2], shapes[1::2], strict=True))
    return {
        "HEADS": heads,
        "POINTS": points,
        "DIM": dim,
        "LEVELS": len(maps),
        "HEIGHTS": tuple(h for h, _ in maps),
        "WIDTHS": tuple(w for _, w in maps),
        "STARTS": tuple(sum(h * w for h, w in maps[:i]) for i in range(len(maps))),
        "SCALES": tuple(float(s) for s in scales),
        "ALL_SLOTS": next_power_of_2(slots),
        **tiles(kind, slots, points, dim),
    }


def _launch(
    values: Tensor,
    offsets: Tensor,
    logits: Tensor,
    offset_table: Tensor,
    logit_table: Tensor,
    reference: Tensor,
    images: Tensor,
    shapes: Sequence[int],
    scales: Sequence[float],
    direction: str,
) -> _Launch:
    groups, queries, _ = offsets.shape
    heads, dim = values.shape[2:]
    rows, slots, points = groups * queries, images.shape[1], offsets.shape[-1] // (2 * heads)
    many = rows * heads >= FEW_PROGRAMS
    kind = direction if many or direction == "forward" else "backward of few"
    options = _options(kind, slots, heads, points, dim, tuple(shapes), tuple(scales))
    tables = [_rows(x) for x in (offsets, logits, offset_table, logit_table)]
    reference = reference if reference.stride(-1) == 1 else reference.contiguous()
    reference_strides = [reference.stride(i) if reference.shape[i] > 1 else 0 for i in (0, 1)]
    values = _whole_images(values)
    return _Launch(
        grid=(cdiv(rows, options["BLOCK_Q"]), heads),
        inputs=(values, *tables, reference, images.contiguous()),
        sizes=(rows, queries, slots, values.stride(0), *(x.stride(0) for x in tables), *reference_strides),
        options=options,
        few=not many,
    )
