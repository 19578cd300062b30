"""Triton kernels of `mmfs_attention`: one program for a block of queries and one head, forward and backward.

Work is laid out in lanes: a lane is one (query, slot, point) of the block, and a tile [lanes, dim] holds one neighbour
of the sample of every lane. With many queries a block has several of them and looks at one slot at a time; with few it
has one query and looks at many slots at once, so that a single query still has enough loads in flight. Nothing is added
up across lanes before the end. Slots behind the last visible one of a block are skipped.

The softmax takes two loops: the first over the logits alone gives the denominator, the second samples. The slot of
logit 0 starts the running maximum, which is therefore never negative.

What the forward pass moves through device memory is its inputs and its result. The samples themselves, 4 neighbours of
`dim` channels each, come from the caches: programs of one head run side by side and look at the same pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = {"forward": (4096, 16), "backward": (2048, 8)}  # numbers in a tile [lanes, dim] with many queries, and a thread
FEW_PROGRAMS = 1024  # below this many (query, head) pairs, a program takes one query and many slots
FIXED_POINT = 2.0**38  # the largest gradient in the deterministic mode; the sum over 2^24 queries fits into an int64


@triton.jit
def _block(images, rows, queries, slots, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
           ALL_SLOTS: tl.constexpr):  # fmt: skip
    """Row, slot within the block of slots and point of every lane; the number of slots to look at."""
    lane = tl.arange(0, BLOCK_Q * BLOCK_S * BLOCK_P)
    first = tl.program_id(0) * BLOCK_Q
    row = first + lane // (BLOCK_S * BLOCK_P)
    own = first + tl.arange(0, BLOCK_Q)
    every = tl.arange(0, ALL_SLOTS)
    real = (own < rows)[:, None] & (every < slots)[None, :]
    seen = tl.load(images + (own // queries)[:, None] * slots + every[None, :], mask=real, other=-1)
    last = tl.max(tl.max(tl.where(seen >= 0, every[None, :] + 1, 0), axis=1), axis=0)
    return row, lane // BLOCK_P % BLOCK_S, lane % BLOCK_P, last


@triton.jit
def _pictures(images, row, slot, point, rows, queries, slots, POINTS: tl.constexpr):
    """The picture of every lane, -1 where it has none."""
    real = (row < rows) & (slot < slots) & (point < POINTS)
    return tl.load(images + (row // queries) * slots + slot, mask=real, other=-1)


@triton.jit
def _logit(logits, logit_table, row, slot, column, seen, logits_row, logit_table_row):
    """Logits of one level, -inf where a lane sees nothing."""
    own = tl.load(logits + row.to(tl.int64) * logits_row + column, mask=seen, other=0.0).to(tl.float32)
    added = tl.load(logit_table + slot * logit_table_row + column, mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, own + added, float("-inf"))


@triton.jit
def _own_offset(offsets, row, column, real, offsets_row):
    """The query's part of the offset (x, y)."""
    place = offsets + row.to(tl.int64) * offsets_row + column
    return tl.load(place, mask=real, other=0.0).to(tl.float32), tl.load(place + 1, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _reference(reference, row, real, queries, reference_group, reference_query):
    """The reference point (x, y) of every lane."""
    place = reference + (row // queries) * reference_group + (row % queries) * reference_query
    return tl.load(place, mask=real, other=0.0).to(tl.float32), tl.load(place + 1, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _level(level, LEVELS: tl.constexpr, HEIGHTS: tl.constexpr, WIDTHS: tl.constexpr, STARTS: tl.constexpr,
           SCALES: tl.constexpr):  # fmt: skip
    """Height, width, first position and scale of a level. Its number is no constant: unrolled, levels spill."""
    height, width, start, scale = HEIGHTS[0], WIDTHS[0], STARTS[0], SCALES[0]
    for other in tl.static_range(1, LEVELS):
        height = tl.where(level == other, HEIGHTS[other], height)
        width = tl.where(level == other, WIDTHS[other], width)
        start = tl.where(level == other, STARTS[other], start)
        scale = tl.where(level == other, SCALES[other], scale)
    return height, width, start, scale


@triton.jit
def _pixel(reference, offset, scale, size):
    """Pixel to the left (above) and the share of the one after it. Whatever lies outside stays just outside."""
    x = reference * size + offset * scale - 0.5
    x = tl.minimum(tl.maximum(x, -2.0), size + 1.0)
    left = tl.floor(x)
    return left.to(tl.int32), x - left


@triton.jit
def _forward_kernel(
    values, offsets, logits, offset_table, logit_table, reference, images, mixed, lse,
    rows, queries, slots, positions, offsets_row, logits_row, offset_table_row, logit_table_row,
    reference_group, reference_query,
    HEADS: tl.constexpr, POINTS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr,
    HEIGHTS: tl.constexpr, WIDTHS: tl.constexpr, STARTS: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    ALL_SLOTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row, slot_in_block, point, last = _block(images, rows, queries, slots, BLOCK_Q, BLOCK_S, BLOCK_P, ALL_SLOTS)
    LANES: tl.constexpr = BLOCK_Q * BLOCK_S * BLOCK_P

    top = tl.zeros([LANES], tl.float32)
    total = tl.zeros([LANES], tl.float32)
    first = tl.zeros([], tl.int32)
    while first < last:
        slot = first + slot_in_block
        seen = _pictures(images, row, slot, point, rows, queries, slots, POINTS) >= 0
        for level in tl.static_range(LEVELS):
            column = (head * LEVELS + level) * POINTS + point
            logit = _logit(logits, logit_table, row, slot, column, seen, logits_row, logit_table_row)
            higher = tl.maximum(top, logit)
            total = total * tl.exp(top - higher) + tl.exp(logit - higher)
            top = higher
        first += BLOCK_S
    by_query = tl.reshape(top, (BLOCK_Q, BLOCK_S * BLOCK_P))
    highest = tl.max(by_query, axis=1)
    parts = tl.reshape(total, (BLOCK_Q, BLOCK_S * BLOCK_P)) * tl.exp(by_query - highest[:, None])
    denominator = tl.exp(-highest) + tl.sum(parts, axis=1)  # exp(-highest): the slot of logit 0
    spread = tl.zeros([BLOCK_Q, BLOCK_S * BLOCK_P], tl.float32)
    top = tl.reshape(spread + highest[:, None], (LANES,))
    share = tl.reshape(spread + (1.0 / denominator)[:, None], (LANES,))

    real = (row < rows) & (point < POINTS)
    own_x, own_y = _own_offset(offsets, row, (head * POINTS + point) * 2, real, offsets_row)
    centre_x, centre_y = _reference(reference, row, real, queries, reference_group, reference_query)
    channel = tl.arange(0, BLOCK_D)
    acc = tl.zeros([LANES, BLOCK_D], tl.float32)
    first = tl.zeros([], tl.int32)
    while first < last:
        slot = first + slot_in_block
        picture = _pictures(images, row, slot, point, rows, queries, slots, POINTS)
        seen = picture >= 0
        more_x, more_y = _own_offset(offset_table, slot, (head * POINTS + point) * 2, seen, offset_table_row)
        origin = values + tl.where(seen, picture, 0).to(tl.int64) * positions * (HEADS * DIM) + head * DIM
        for level in range(LEVELS):
            height, width, start, scale = _level(level, LEVELS, HEIGHTS, WIDTHS, STARTS, SCALES)
            column = (head * LEVELS + level) * POINTS + point
            logit = _logit(logits, logit_table, row, slot, column, seen, logits_row, logit_table_row)
            weight = tl.exp(logit - top) * share
            left, right_share = _pixel(centre_x, own_x + more_x, scale, width)
            above, below_share = _pixel(centre_y, own_y + more_y, scale, height)
            for corner in tl.static_range(4):
                x, y = left + corner % 2, above + corner // 2
                inside = seen & (x >= 0) & (x < width) & (y >= 0) & (y < height)
                part_x = right_share if corner % 2 == 1 else 1 - right_share
                part_y = below_share if corner // 2 == 1 else 1 - below_share
                place = origin + (start + y * width + x) * (HEADS * DIM)
                wanted = inside[:, None] & (channel < DIM)[None, :]
                tile = tl.load(place[:, None] + channel[None, :], mask=wanted, other=0.0).to(tl.float32)
                acc += (weight * part_x * part_y)[:, None] * tile
        first += BLOCK_S

    own = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    result = tl.sum(tl.reshape(acc, (BLOCK_Q, BLOCK_S * BLOCK_P, BLOCK_D)), axis=1)
    place = mixed + (own.to(tl.int64) * HEADS + head)[:, None] * DIM + channel[None, :]
    tl.store(place, result, mask=(own < rows)[:, None] & (channel < DIM)[None, :])
    tl.store(lse + own * HEADS + head, highest + tl.log(denominator), mask=own < rows)


@triton.jit
def _add_to_values(place, amount, wanted, fixed_point, FIXED: tl.constexpr):
    """Atomically; integers add up to the same in any order."""
    if FIXED:
        tl.atomic_add(place, tl.floor(amount * fixed_point + 0.5).to(tl.int64), mask=wanted, sem="relaxed")
    else:
        tl.atomic_add(place, amount, mask=wanted, sem="relaxed")


@triton.jit
def _backward_kernel(
    values, offsets, logits, offset_table, logit_table, reference, images, mixed, lse, grad_mixed, grad_lse,
    grad_values, grad_offsets, grad_logits, offset_table_parts, logit_table_parts, fixed_point,
    rows, queries, slots, positions, offsets_row, logits_row, offset_table_row, logit_table_row,
    reference_group, reference_query,
    HEADS: tl.constexpr, POINTS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr,
    HEIGHTS: tl.constexpr, WIDTHS: tl.constexpr, STARTS: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    ALL_SLOTS: tl.constexpr, BLOCK_L: tl.constexpr, FOR_VALUES: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row, slot_in_block, point, last = _block(images, rows, queries, slots, BLOCK_Q, BLOCK_S, BLOCK_P, ALL_SLOTS)
    LANES: tl.constexpr = BLOCK_Q * BLOCK_S * BLOCK_P
    real = (row < rows) & (point < POINTS)
    channel = tl.arange(0, BLOCK_D)
    cell = row.to(tl.int64) * HEADS + head
    place = cell[:, None] * DIM + channel[None, :]
    present = real[:, None] & (channel < DIM)[None, :]
    grad = tl.load(grad_mixed + place, mask=present, other=0.0)
    # d logit_j = w_j (<grad, sample_j> - mean), where the mean counts the gradient of lse in.
    mean = tl.sum(grad * tl.load(mixed + place, mask=present, other=0.0), axis=1)
    mean -= tl.load(grad_lse + cell, mask=real, other=0.0)
    top = tl.load(lse + cell, mask=real, other=0.0)
    scale_up = tl.load(fixed_point) if FIXED else 1.0
    own_x, own_y = _own_offset(offsets, row, (head * POINTS + point) * 2, real, offsets_row)
    centre_x, centre_y = _reference(reference, row, real, queries, reference_group, reference_query)
    all_x = tl.zeros([LANES], tl.float32)
    all_y = tl.zeros([LANES], tl.float32)
    all_logits = tl.zeros([LANES, BLOCK_L], tl.float32)
    level_number = tl.arange(0, BLOCK_L)
    part = tl.program_id(0).to(tl.int64) * slots
    slot_of_column = tl.arange(0, BLOCK_S * BLOCK_P) // BLOCK_P
    point_of_column = tl.arange(0, BLOCK_S * BLOCK_P) % BLOCK_P

    first = tl.zeros([], tl.int32)
    while first < last:
        slot = first + slot_in_block
        picture = _pictures(images, row, slot, point, rows, queries, slots, POINTS)
        seen = picture >= 0
        more_x, more_y = _own_offset(offset_table, slot, (head * POINTS + point) * 2, seen, offset_table_row)
        origin = tl.where(seen, picture, 0).to(tl.int64) * positions * (HEADS * DIM) + head * DIM
        table_row = part + first + slot_of_column
        in_table = (first + slot_of_column < slots) & (point_of_column < POINTS)
        slot_x = tl.zeros([LANES], tl.float32)
        slot_y = tl.zeros([LANES], tl.float32)
        for level in range(LEVELS):
            height, width, start, scale = _level(level, LEVELS, HEIGHTS, WIDTHS, STARTS, SCALES)
            column = (head * LEVELS + level) * POINTS + point
            logit = _logit(logits, logit_table, row, slot, column, seen, logits_row, logit_table_row)
            weight = tl.exp(logit - top)
            left, right_share = _pixel(centre_x, own_x + more_x, scale, width)
            above, below_share = _pixel(centre_y, own_y + more_y, scale, height)
            sampled = tl.zeros([LANES], tl.float32)
            along_x = tl.zeros([LANES], tl.float32)
            along_y = tl.zeros([LANES], tl.float32)
            for corner in tl.static_range(4):
                x, y = left + corner % 2, above + corner // 2
                inside = seen & (x >= 0) & (x < width) & (y >= 0) & (y < height)
                part_x = right_share if corner % 2 == 1 else 1 - right_share
                part_y = below_share if corner // 2 == 1 else 1 - below_share
                place = origin + (start + y * width + x) * (HEADS * DIM)
                place = place[:, None] + channel[None, :]
                wanted = inside[:, None] & (channel < DIM)[None, :]
                tile = tl.load(values + place, mask=wanted, other=0.0).to(tl.float32)
                product = tl.sum(tile * grad, axis=1)
                sampled += part_x * part_y * product
                along_x += part_y * product * (2 * (corner % 2) - 1)
                along_y += part_x * product * (2 * (corner // 2) - 1)
                if FOR_VALUES:
                    amount = (weight * part_x * part_y)[:, None] * grad
                    _add_to_values(grad_values + place, amount, wanted, scale_up, FIXED)
            grad_logit = weight * (sampled - mean)
            all_logits += tl.where(level_number[None, :] == level, grad_logit[:, None], 0.0)
            by_column = tl.sum(tl.reshape(grad_logit, (BLOCK_Q, BLOCK_S * BLOCK_P)), axis=0)
            table_column = (head * LEVELS + level) * POINTS + point_of_column
            tl.store(logit_table_parts + table_row * (HEADS * LEVELS * POINTS) + table_column, by_column, mask=in_table)
            slot_x += weight * along_x * scale
            slot_y += weight * along_y * scale
        all_x += slot_x
        all_y += slot_y
        table_place = offset_table_parts + table_row * (HEADS * POINTS * 2) + (head * POINTS + point_of_column) * 2
        by_x = tl.sum(tl.reshape(slot_x, (BLOCK_Q, BLOCK_S * BLOCK_P)), axis=0)
        by_y = tl.sum(tl.reshape(slot_y, (BLOCK_Q, BLOCK_S * BLOCK_P)), axis=0)
        tl.store(table_place, by_x, mask=in_table)
        tl.store(table_place + 1, by_y, mask=in_table)
        first += BLOCK_S
    _store_query_gradients(
        grad_offsets, grad_logits, all_x, all_y, all_logits, head, rows,
        HEADS, POINTS, LEVELS, BLOCK_Q, BLOCK_S, BLOCK_P, BLOCK_L,
    )  # fmt: skip


@triton.jit
def _store_query_gradients(
    grad_offsets, grad_logits, all_x, all_y, all_logits, head, rows,
    HEADS: tl.constexpr, POINTS: tl.constexpr, LEVELS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Sums over the slots of a block, to [rows, heads * points * 2] and [rows, heads * levels * points]."""
    row = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q))[:, None]
    point = tl.arange(0, BLOCK_P)[None, :]
    real = (row < rows) & (point < POINTS)
    place = grad_offsets + row.to(tl.int64) * (HEADS * POINTS * 2) + (head * POINTS + point) * 2
    tl.store(place, tl.sum(tl.reshape(all_x, (BLOCK_Q, BLOCK_S, BLOCK_P)), axis=1), mask=real)
    tl.store(place + 1, tl.sum(tl.reshape(all_y, (BLOCK_Q, BLOCK_S, BLOCK_P)), axis=1), mask=real)
    summed = tl.sum(tl.reshape(all_logits, (BLOCK_Q, BLOCK_S, BLOCK_P, BLOCK_L)), axis=1)
    level = tl.arange(0, BLOCK_L)[None, None, :]
    column = (head * LEVELS + level) * POINTS + point[:, :, None]
    place = grad_logits + row.to(tl.int64)[:, :, None] * (HEADS * LEVELS * POINTS) + column
    tl.store(place, summed, mask=real[:, :, None] & (level < LEVELS))


@dataclass
class _Launch:
    """What both kernels are launched with: the grid, the inputs in the form they read them, sizes and strides."""

    grid: tuple[int, int]
    inputs: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    options: dict[str, Any]


def _rows(x: Tensor) -> Tensor:
    """[..., width] as [rows, width] with neighbouring columns; a copy only where the strides demand it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def tiles(rows: int, slots: int, heads: int, points: int, dim: int, direction: str) -> dict[str, int]:
    """Block sizes of a launch in a `direction`, powers of two, and its warps."""
    numbers, a_thread = TILES[direction]
    block_p, block_d = triton.next_power_of_2(points), triton.next_power_of_2(dim)
    lanes = max(min(numbers // block_d, 128), block_p)
    if rows * heads >= FEW_PROGRAMS:
        block_q, block_s = lanes // block_p, 1
    else:
        block_q, block_s = 1, min(triton.next_power_of_2(slots), max(2 * lanes // block_p, 1))
    warps = max(1, min(8, block_q * block_s * block_p * block_d // (32 * a_thread)))
    return {"BLOCK_Q": block_q, "BLOCK_S": block_s, "BLOCK_P": block_p, "BLOCK_D": block_d, "num_warps": warps}


def _launch(
    values: Tensor,
    offsets: Tensor,
    logits: Tensor,
    offset_table: Tensor,
    logit_table: Tensor,
    reference: Tensor,
    images: Tensor,
    shapes: list[int],
    scales: list[float],
    direction: str,
) -> _Launch:
    groups, queries, _ = offsets.shape
    _, positions, heads, dim = values.shape
    rows, slots, points = groups * queries, images.shape[1], offsets.shape[-1] // (2 * heads)
    maps = list(zip(shapes[::2], shapes[1::2], strict=True))
    blocks = tiles(rows, slots, heads, points, dim, direction)
    tables = [_rows(x) for x in (offsets, logits, offset_table, logit_table)]
    reference = reference if reference.stride(-1) == 1 else reference.contiguous()
    reference_strides = [reference.stride(i) if reference.shape[i] > 1 else 0 for i in (0, 1)]
    return _Launch(
        grid=(triton.cdiv(rows, blocks["BLOCK_Q"]), heads),
        inputs=(values.contiguous(), *tables, reference, images.contiguous()),
        sizes=(rows, queries, slots, positions, *(x.stride(0) for x in tables), *reference_strides),
        options={
            "HEADS": heads,
            "POINTS": points,
            "DIM": dim,
            "LEVELS": len(maps),
            "HEIGHTS": tuple(h for h, _ in maps),
            "WIDTHS": tuple(w for _, w in maps),
            "STARTS": tuple(sum(h * w for h, w in maps[:i]) for i in range(len(maps))),
            "SCALES": tuple(float(s) for s in scales),
            "ALL_SLOTS": triton.next_power_of_2(slots),
            **blocks,
        },
    )


def forward(values: Tensor, offsets: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Mixed samples and log-sum-exp; see `mmfs_attention_kernel`."""
    groups, queries, _ = offsets.shape
    heads, dim = values.shape[2:]
    mixed = values.new_empty((groups, queries, heads, dim), dtype=torch.float32)
    lse = values.new_empty((groups, queries, heads), dtype=torch.float32)
    launch = _launch(values, offsets, *others, direction="forward")
    with torch.cuda.device_of(values):
        _forward_kernel[launch.grid](*launch.inputs, mixed, lse, *launch.sizes, **launch.options)
    return mixed, lse


def backward(
    grad_mixed: Tensor,
    grad_lse: Tensor,
    mixed: Tensor,
    lse: Tensor,
    *inputs: Any,
    deterministic: bool,
    for_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to values, offsets, logits and the two tables; see `mmfs_attention_backward`."""
    values, offsets, logits, offset_table, logit_table = inputs[:5]
    launch = _launch(*inputs, direction="backward")
    grad_mixed = grad_mixed.contiguous()
    kind = torch.int64 if deterministic else torch.float32
    grad_values = torch.zeros(values.shape if for_values else (0,), dtype=kind, device=values.device)
    largest = grad_mixed.abs().amax() if deterministic and for_values else grad_mixed.new_ones(())
    fixed_point = FIXED_POINT / largest.clamp(min=torch.finfo(torch.float32).tiny * FIXED_POINT)
    grad_offsets = torch.empty(offsets.shape, dtype=offsets.dtype, device=values.device)
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=values.device)
    parts = [
        torch.zeros((launch.grid[0], *x.shape), dtype=torch.float32, device=values.device)
        for x in (offset_table, logit_table)
    ]
    with torch.cuda.device_of(values):
        _backward_kernel[launch.grid](
            *launch.inputs, mixed, lse, grad_mixed, grad_lse.contiguous(), grad_values, grad_offsets, grad_logits,
            *parts, fixed_point, *launch.sizes, **launch.options, BLOCK_L=triton.next_power_of_2(len(inputs[-1])),
            FOR_VALUES=for_values, FIXED=deterministic,
        )  # fmt: skip
    if deterministic and for_values:
        grad_values = grad_values.to(torch.float32) / fixed_point
    of_tables = [p.sum(0).to(x.dtype) for p, x in zip(parts, (offset_table, logit_table), strict=True)]
    return grad_values.to(values.dtype), grad_offsets, grad_logits, of_tables[0], of_tables[1]
