"""The backward pass of `mmfs_triton.py`: two kernels that write every number once, so results are deterministic.

`_queries_kernel` computes the gradients of offsets, logits and tables. Like the forward kernel, a program samples for a
block of queries and one head; a sample takes 50 warp instructions.

`_values_kernel` computes the gradient of the values. Adding to the neighbours of every sample would take a billion
atomic additions. Instead a program owns a tile of cells of one image, level and head, and reads the queries that the
image is visible to. Bilinear weights are products of two hat functions, so the weights of a block of queries are a
matrix

    A[(y, x), q] = sum over points p of  w_qp * max(0, 1 - |y - y_qp|) * max(0, 1 - |x - x_qp|)

which takes one multiply-add for each point. A times the gradients of the queries is a product for tensor cores. Most of
A is zero: points that are not near the tile for any query of the block are skipped, and so are blocks without such
points, which are most of them if the queries are cells of a map. Offsets and logits are transposed first, because the
kernel reads one number of many queries at a time; without that every load touches 32 cache lines, which took most of
the time. In half precision A and the gradients are rounded to the type of the values.

Axes: I images, S spatial positions of all levels, Q queries, N heads, P points, V levels, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mmfs_triton_shared import (
    FIXED,
    _block,
    _channels,
    _hat,
    _image_of,
    _Launch,
    _launch,
    _level,
    _logit,
    _neighbours,
    _own_offset,
    _reference,
)
from .typed_triton import cdiv, jit, next_power_of_2

CELLS, QUERIES = 64, 128  # most cells and queries of a program of `_values_kernel`
REGISTERS = 168  # most registers of its threads; if the compiler chooses, it takes 1.26 times as long on an H200
FEW_TILES = 264  # below this many tiles the queries of a tile are spread over several programs; 2 per multiprocessor


@jit
def _slope(behind):
    """The derivative of a cell's bilinear weight by the position of a sample, at distance `behind` from the cell."""
    return tl.where((behind >= -1.0) & (behind < 1.0), tl.where(behind >= 0.0, -1.0, 1.0), 0.0)


@jit
def _product(values, place, low, high, channel, HALF: tl.constexpr, DIM: tl.constexpr):
    """The dot product of one cell of every lane with the gradient of its query."""
    products = low * _channels(values + place, channel, DIM, 2 * HALF)
    products += high * _channels(values + place, channel + HALF, DIM, 2 * HALF)
    return tl.sum(products, axis=1)


@jit
def _sampled(values, corner, x, y, height, width, low, high, channel, STRIDE: tl.constexpr, HALF: tl.constexpr,
             DIM: tl.constexpr):  # fmt: skip
    """The dot products of samples at (x, y) with the gradients, and their derivatives by x and y.

    `corner` is the first cell of the level.
    """
    left, behind_x, x_near, x_far = _neighbours(x, width)
    above, behind_y, y_near, y_far = _neighbours(y, height)
    x_falls, x_grows = _slope(behind_x), tl.where(width > 1, _slope(behind_x - 1.0), 0.0)
    y_falls, y_grows = _slope(behind_y), tl.where(height > 1, _slope(behind_y - 1.0), 0.0)
    right, below = tl.where(width > 1, STRIDE, 0), tl.where(height > 1, width * STRIDE, 0)
    place = corner + (above * width + left) * STRIDE
    near = _product(values, place, low, high, channel, HALF, DIM)
    far = _product(values, place + right, low, high, channel, HALF, DIM)
    upper, upper_x = x_near * near + x_far * far, x_falls * near + x_grows * far
    near = _product(values, place + below, low, high, channel, HALF, DIM)
    far = _product(values, place + (below + right), low, high, channel, HALF, DIM)
    lower, lower_x = x_near * near + x_far * far, x_falls * near + x_grows * far
    return y_near * upper + y_far * lower, y_near * upper_x + y_far * lower_x, y_falls * upper + y_grows * lower


@jit
def _queries_kernel(
    values, offsets, logits, offset_table, logit_table, reference, images, mixed, lse, grad_mixed, grad_lse,
    grad_offsets, grad_logits, offset_table_parts, logit_table_parts,
    rows, queries, slots, image_size, offsets_row, logits_row, offset_table_row, logit_table_row,
    reference_group, reference_query,
    HEADS: tl.constexpr, POINTS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr,
    HEIGHTS: tl.constexpr, WIDTHS: tl.constexpr, STARTS: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    ALL_SLOTS: tl.constexpr, BLOCK_L: tl.constexpr, GRAD_LSE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row, slot_in_block, point, last, _ = _block(images, rows, queries, slots, BLOCK_Q, BLOCK_S, BLOCK_P, ALL_SLOTS)
    LANES: tl.constexpr = BLOCK_Q * BLOCK_S * BLOCK_P
    HALF: tl.constexpr = BLOCK_D // 2
    real = (row < rows) & (point < POINTS)
    cell = tl.where(row < rows, row, 0).to(tl.int64) * HEADS + head
    channel = tl.arange(0, HALF)
    low = _channels(grad_mixed + cell * DIM, channel, DIM, BLOCK_D)
    high = _channels(grad_mixed + cell * DIM, channel + HALF, DIM, BLOCK_D)
    # d logit_j = w_j (<grad, sample_j> - mean), where the mean includes the gradient of lse.
    mean = _product(mixed, cell * DIM, low, high, channel, HALF, DIM)
    if GRAD_LSE:
        mean -= tl.load(grad_lse + cell)
    top = tl.load(lse + cell)
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
        image = _image_of(images, row, slot, point, rows, queries, slots, POINTS)
        seen = image >= 0
        more_x, more_y = _own_offset(offset_table, slot, (head * POINTS + point) * 2, seen, offset_table_row)
        origin = tl.maximum(image, 0).to(tl.int64) * image_size + head * DIM
        table_row = part + first + slot_of_column
        in_table = (first + slot_of_column < slots) & (point_of_column < POINTS)
        slot_x = tl.zeros([LANES], tl.float32)
        slot_y = tl.zeros([LANES], tl.float32)
        for level in range(LEVELS):
            height, width, start, scale = _level(level, LEVELS, HEIGHTS, WIDTHS, STARTS, SCALES)
            column = (head * LEVELS + level) * POINTS + point
            logit = _logit(logits, logit_table, row, slot, column, seen, logits_row, logit_table_row)
            weight = tl.exp(logit - top)
            x = centre_x * width + (own_x + more_x) * scale - 0.5
            y = centre_y * height + (own_y + more_y) * scale - 0.5
            sampled, along_x, along_y = _sampled(
                values, origin + start * (HEADS * DIM), x, y, height, width, low, high, channel, HEADS * DIM, HALF, DIM
            )
            grad_logit = tl.where(seen, weight * (sampled - mean), 0.0)
            all_logits += tl.where(level_number[None, :] == level, grad_logit[:, None], 0.0)
            by_column = tl.sum(tl.reshape(grad_logit, (BLOCK_Q, BLOCK_S * BLOCK_P)), axis=0)
            table_column = (head * LEVELS + level) * POINTS + point_of_column
            tl.store(logit_table_parts + table_row * (HEADS * LEVELS * POINTS) + table_column, by_column, mask=in_table)
            slot_x += tl.where(seen, weight * along_x * scale, 0.0)
            slot_y += tl.where(seen, weight * along_y * scale, 0.0)
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


@jit
def _store_query_gradients(
    grad_offsets, grad_logits, all_x, all_y, all_logits, head, rows,
    HEADS: tl.constexpr, POINTS: tl.constexpr, LEVELS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Store sums over the slots of a block into [rows, N * P * 2] and [rows, N * V * P]."""
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


@jit
def _tile(HEIGHTS: tl.constexpr, WIDTHS: tl.constexpr, LEVELS: tl.constexpr, BLOCK_Y: tl.constexpr,
          BLOCK_X: tl.constexpr):  # fmt: skip
    """Level, first row and first column of the tile of a program; the tiles of a level are in row-major order."""
    left_over = tl.program_id(0)
    level = tl.zeros([], tl.int32)
    across = tl.zeros([], tl.int32) + (WIDTHS[0] + BLOCK_X - 1) // BLOCK_X
    for before in tl.static_range(LEVELS - 1):
        count = ((HEIGHTS[before] + BLOCK_Y - 1) // BLOCK_Y) * ((WIDTHS[before] + BLOCK_X - 1) // BLOCK_X)
        here = (level == before) & (left_over >= count)
        left_over = tl.where(here, left_over - count, left_over)
        level = tl.where(here, before + 1, level)
        across = tl.where(here, (WIDTHS[before + 1] + BLOCK_X - 1) // BLOCK_X, across)
    return level, left_over // across * BLOCK_Y, left_over % across * BLOCK_X


@jit
def _places(own, added, at, rows, middle_x, middle_y, scale):
    """Pixel coordinates (x, y) of one sample of every query, from the offsets of the query and of the slot."""
    x = tl.load(own + at * rows).to(tl.float32) + tl.load(added + at).to(tl.float32)
    y = tl.load(own + (at + 1) * rows).to(tl.float32) + tl.load(added + at + 1).to(tl.float32)
    return middle_x + x * scale, middle_y + y * scale


@jit
def _either(a, b):
    return a | b


@jit
def _values_kernel(
    offsets, logits, offset_table, logit_table, reference, lse, grad_mixed, entries, bounds, grad_values,
    rows, queries, slots, positions, offset_table_row, logit_table_row, reference_group, reference_query, splits,
    split_stride,
    HEADS: tl.constexpr, POINTS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr,
    HEIGHTS: tl.constexpr, WIDTHS: tl.constexpr, STARTS: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """The gradient of the values for one tile of cells.

    `entries` are the (group, slot) pairs sorted by image; those of image i are from bounds[i] to bounds[i + 1].
    `offsets`, `logits` and `lse` have the queries as their last axis, because a block reads one number of many queries.
    """
    head = tl.program_id(1)
    image, split = tl.program_id(2) // splits, tl.program_id(2) % splits
    level, top, left = _tile(HEIGHTS, WIDTHS, LEVELS, BLOCK_Y, BLOCK_X)
    height, width, start, scale = _level(level, LEVELS, HEIGHTS, WIDTHS, STARTS, SCALES)
    begin = tl.load(bounds + image)
    count = (tl.load(bounds + image + 1) - begin) * queries
    share = tl.cdiv(tl.cdiv(count, BLOCK_Q), splits) * BLOCK_Q
    first = split * share
    last = tl.minimum(first + share, count)
    reach_y, reach_x = (BLOCK_Y - 1) / 2, (BLOCK_X - 1) / 2  # coordinates count from the centre of the tile
    cell_y = (tl.arange(0, BLOCK_Y).to(tl.float32) - reach_y)[:, None]
    cell_x = (tl.arange(0, BLOCK_X).to(tl.float32) - reach_x)[:, None]
    channel = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_Y * BLOCK_X, BLOCK_D], tl.float32)
    while first < last:
        # Beyond the last query the last one is repeated with weight 0, so that loads need no mask.
        real = first + tl.arange(0, BLOCK_Q) < last
        number = tl.minimum(first + tl.arange(0, BLOCK_Q), last - 1)
        entry = tl.load(entries + begin + number // queries).to(tl.int32)
        row, slot = entry // slots * queries + number % queries, entry % slots
        centre = reference + (row // queries) * reference_group + (row % queries) * reference_query
        middle_x = tl.load(centre).to(tl.float32) * width - 0.5 - (left + reach_x)
        middle_y = tl.load(centre + 1).to(tl.float32) * height - 0.5 - (top + reach_y)
        own = offsets + head.to(tl.int64) * (POINTS * 2) * rows + row
        added = offset_table + (slot.to(tl.int64) * offset_table_row + head * (POINTS * 2))
        bits = tl.zeros([BLOCK_Q], tl.int32)
        for p in tl.static_range(POINTS):
            x, y = _places(own, added, 2 * p, rows, middle_x, middle_y, scale)
            near = (tl.abs(x) < reach_x + 1) & (tl.abs(y) < reach_y + 1)
            bits |= tl.where(near, 1 << p, 0)
        points_near = tl.reduce(bits, 0, _either)
        if points_near != 0:
            matrix = tl.zeros([BLOCK_Y, BLOCK_X, BLOCK_Q], tl.float32)
            cell = row.to(tl.int64) * HEADS + head
            denominator = tl.where(real, tl.load(lse + head.to(tl.int64) * rows + row), float("inf"))
            own_logit = logits + (head * LEVELS + level).to(tl.int64) * POINTS * rows + row
            added_logit = logit_table + (slot.to(tl.int64) * logit_table_row + (head * LEVELS + level) * POINTS)
            for point in range(POINTS):
                if (points_near >> point) & 1 != 0:
                    at_x, at_y = _places(own, added, 2 * point, rows, middle_x, middle_y, scale)
                    logit = tl.load(own_logit + point * rows).to(tl.float32) + tl.load(added_logit + point).to(
                        tl.float32
                    )
                    of_x = _hat(cell_x - at_x[None, :])
                    of_y = tl.exp(logit - denominator)[None, :] * _hat(cell_y - at_y[None, :])
                    matrix += of_y[:, None, :] * of_x[None, :, :]
            place = grad_mixed + cell[:, None] * DIM + channel[None, :]
            grad = tl.load(place) if DIM == BLOCK_D else tl.load(place, mask=(channel < DIM)[None, :], other=0.0)
            matrix = tl.reshape(matrix, (BLOCK_Y * BLOCK_X, BLOCK_Q)).to(PRODUCT)
            acc = tl.dot(matrix, grad.to(PRODUCT), acc, input_precision="ieee")
        first += BLOCK_Q

    cell = tl.arange(0, BLOCK_Y * BLOCK_X)
    y, x = top + cell // BLOCK_X, left + cell % BLOCK_X
    place = (image * positions + start + y * width + x).to(tl.int64) * (HEADS * DIM) + head * DIM
    wanted = ((y < height) & (x < width))[:, None] & (channel < DIM)[None, :]
    place = grad_values + split * split_stride + place[:, None] + channel[None, :]
    # Without the factor the compiler would round the sum in the loop, after every block.
    tl.store(place, acc * wanted.to(tl.float32), mask=wanted)


def _seen_by(images: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """The entries of `images` sorted by image, and the first entry of each image [I + 1]; no synchronisation."""
    ordered, entries = torch.sort(images.reshape(-1).to(torch.int32), stable=True)
    numbers = torch.arange(num_images + 1, dtype=torch.int32, device=images.device)
    return entries, torch.searchsorted(ordered, numbers, out_int32=True)


def _up_to(size: int, most: int) -> int:
    return min(next_power_of_2(size), most)


def value_tile(maps: list[tuple[int, int]], dim: int, queries: int) -> dict[str, Any]:
    """Block sizes, warps and registers of `_values_kernel` for groups of so many queries.

    The queries of a map are in row-major order, so wide and low tiles are near fewer blocks of queries. Tensor cores
    need at least 16 cells and 16 channels.
    """
    block_x = _up_to(max(w for _, w in maps), 8 if queries == 1 else 16)
    block_y = max(_up_to(max(h for h, _ in maps), CELLS // block_x), 16 // block_x)
    block_d = max(next_power_of_2(dim), 16)
    blocks = {"BLOCK_Y": block_y, "BLOCK_X": block_x, "BLOCK_Q": QUERIES, "BLOCK_D": block_d}
    return {**blocks, "num_warps": 4 if block_d <= 64 else 8, "maxnreg": REGISTERS}


def _product_type(kernel: Any, values: Tensor) -> tl.dtype:
    """The type of products: that of the values. Triton's interpreter supports no bfloat16 products."""
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return types[values.dtype] if isinstance(kernel, triton.JITFunction) else tl.float32


def _gradient_of_values(launch: _Launch, grad_mixed: Tensor, lse: Tensor) -> Tensor:
    """The gradient of the values. If there are few tiles, several programs share the queries of one."""
    values, offsets, logits, *others, images = launch.inputs
    num_images, positions, heads, dim = values.shape
    rows, queries, slots, _, _, _, *strides = launch.sizes
    fixed = {name: launch.options[name] for name in FIXED}
    maps = list(zip(fixed["HEIGHTS"], fixed["WIDTHS"], strict=True))
    tile = value_tile(maps, dim, queries)
    tiles = sum(cdiv(h, tile["BLOCK_Y"]) * cdiv(w, tile["BLOCK_X"]) for h, w in maps)
    few = FEW_TILES // max(tiles * heads * num_images, 1)
    splits = max(1, min(few, cdiv(rows, 4 * tile["BLOCK_Q"])))
    kind = values.dtype if splits == 1 else torch.float32
    parts = torch.empty((splits, *values.shape), dtype=kind, device=values.device)
    if num_images > 0:
        entries, bounds = _seen_by(images, num_images)
        offsets, logits, lse = (x.t().contiguous() for x in (offsets, logits, lse.view(rows, heads)))
        _values_kernel[(tiles, heads, num_images * splits)](
            offsets, logits, *others, lse, grad_mixed, entries, bounds, parts, rows, queries, slots, positions,
            *strides, splits, values.numel(), **fixed, **tile, PRODUCT=_product_type(_values_kernel, values),
        )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0).to(values.dtype)


def backward(
    grad_mixed: Tensor, grad_lse: Tensor | None, mixed: Tensor, lse: Tensor, *inputs: Any, for_values: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to values, offsets, logits and the two tables; see `mmfs_attention_backward`."""
    values, offsets, logits, offset_table, logit_table = inputs[:5]
    launch = _launch(*inputs, direction="backward")
    grad_mixed = grad_mixed.contiguous()
    of_lse = lse if grad_lse is None else grad_lse.contiguous()
    grad_offsets = torch.empty(offsets.shape, dtype=offsets.dtype, device=values.device)
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=values.device)
    parts = [
        torch.zeros((launch.grid[0], *x.shape), dtype=torch.float32, device=values.device)
        for x in (offset_table, logit_table)
    ]
    with torch.cuda.device_of(values):
        _queries_kernel[launch.grid](
            *launch.inputs, mixed, lse, grad_mixed, of_lse, grad_offsets, grad_logits, *parts, *launch.sizes,
            **launch.options, BLOCK_L=next_power_of_2(len(inputs[-1])), GRAD_LSE=grad_lse is not None,
        )  # fmt: skip
        of_values = _gradient_of_values(launch, grad_mixed, lse) if for_values else values.new_empty(0)
    of_tables = [p.sum(0).to(x.dtype) for p, x in zip(parts, (offset_table, logit_table), strict=True)]
    return of_values, grad_offsets, grad_logits, of_tables[0], of_tables[1]
