"""The forward Triton kernels of `mmfs_attention`: one for many queries, and a pair for few queries.

A lane is one (query, slot, point). A tile [lanes, D] holds one neighbour of the sample of every lane.

- Many queries: a program has a block of queries and one head. It loops over the slots and over the levels. Lanes are
  not added up before the end: every lane has an online softmax of its own, whose sum is rescaled when a higher logit
  occurs. Slots after the last visible one of the block are skipped.
- Few queries: a program has one query and one level of some slots; a second kernel combines the parts.

The running maximum starts at 0, the logit of the extra slot, so it is never negative.

The forward pass moves only its inputs and its result through device memory. The samples, 4 neighbours of D channels
each, come from the caches, because programs of one head run at the same time and sample the same images. The kernel is
limited by instruction issue. So a tile is loaded in two halves of the channels, and a thread has fewer lanes and more
channels. Coordinates are clamped to the map and bilinear weights are 0 outside, so that loads need no mask. For heads
of 64 bfloat16 channels a sample takes 25 warp instructions (sm_90, counted in the machine code), 17 of them to convert
and add up 4 x 64 numbers.

Axes: I images, S spatial positions of all levels, Q queries, N heads, P points, V levels, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .mmfs_triton_shared import (
    FIXED,
    _block,
    _channels,
    _image_of,
    _Launch,
    _launch,
    _level,
    _logit,
    _neighbours,
    _own_offset,
    _reference,
)
from .overlap import overlap
from .typed_triton import cdiv, jit, next_power_of_2

FEW_SLOTS = 2  # slots of a program of the kernel for few queries


@jit
def _to_lanes(by_query, BLOCK_Q: tl.constexpr, A_QUERY: tl.constexpr):
    """The value of each query repeated for its lanes."""
    return tl.reshape(tl.broadcast_to(by_query[:, None], (BLOCK_Q, A_QUERY)), (BLOCK_Q * A_QUERY,))


@jit
def _forward_kernel(
    values, offsets, logits, offset_table, logit_table, reference, images, ignore, mixed, lse,
    rows, queries, slots, image_size, offsets_row, logits_row, offset_table_row, logit_table_row,
    reference_group, reference_query,
    HEADS: tl.constexpr, POINTS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr,
    HEIGHTS: tl.constexpr, WIDTHS: tl.constexpr, STARTS: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    ALL_SLOTS: tl.constexpr, IGNORE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row, slot_in_block, point, last, newest = _block(images, rows, queries, slots, BLOCK_Q, BLOCK_S, BLOCK_P, ALL_SLOTS)
    LANES: tl.constexpr = BLOCK_Q * BLOCK_S * BLOCK_P
    HALF: tl.constexpr = BLOCK_D // 2
    STRIDE: tl.constexpr = HEADS * DIM
    # A lane without an image has weight 0, but what it reads must be finite: it reads a visible image of its query.
    instead = _to_lanes(tl.maximum(newest, 0), BLOCK_Q, BLOCK_S * BLOCK_P)
    real = (row < rows) & (point < POINTS)
    own_x, own_y = _own_offset(offsets, row, (head * POINTS + point) * 2, real, offsets_row)
    centre_x, centre_y = _reference(reference, row, real, queries, reference_group, reference_query)
    channel = tl.arange(0, HALF)
    top = tl.zeros([LANES], tl.float32)
    total = tl.zeros([LANES], tl.float32)
    low = tl.zeros([LANES, HALF], tl.float32)
    high = tl.zeros([LANES, HALF], tl.float32)
    first = tl.zeros([], tl.int32)
    while first < last:
        slot = first + slot_in_block
        image = _image_of(images, row, slot, point, rows, queries, slots, POINTS)
        seen = image >= 0
        higher = top
        for level in tl.static_range(LEVELS):
            column = (head * LEVELS + level) * POINTS + point
            logit = _logit(logits, logit_table, row, slot, column, seen, logits_row, logit_table_row)
            higher = tl.maximum(higher, logit)
        shrunk = tl.exp(top - higher)
        top, total = higher, total * shrunk
        low, high = low * shrunk[:, None], high * shrunk[:, None]
        more_x, more_y = _own_offset(offset_table, slot, (head * POINTS + point) * 2, seen, offset_table_row)
        origin = values + tl.where(seen, image, instead).to(tl.int64) * image_size + head * DIM
        for level in range(LEVELS):
            height, width, start, scale = _level(level, LEVELS, HEIGHTS, WIDTHS, STARTS, SCALES)
            column = (head * LEVELS + level) * POINTS + point
            logit = _logit(logits, logit_table, row, slot, column, seen, logits_row, logit_table_row)
            weight = tl.exp(logit - top)
            total += weight
            left, _, x_near, x_far = _neighbours(centre_x * width + (own_x + more_x) * scale - 0.5, width)
            above, _, y_near, y_far = _neighbours(centre_y * height + (own_y + more_y) * scale - 0.5, height)
            corner = origin + (start + above * width + left) * STRIDE
            right, below = tl.where(width > 1, STRIDE, 0), tl.where(height > 1, width * STRIDE, 0)
            for number in tl.static_range(4):
                share = weight * (y_far if number // 2 == 1 else y_near) * (x_far if number % 2 == 1 else x_near)
                place = corner + (number // 2 * below + number % 2 * right)
                low += share[:, None] * _channels(place, channel, DIM, BLOCK_D)
                high += share[:, None] * _channels(place, channel + HALF, DIM, BLOCK_D)
        first += BLOCK_S

    by_query = tl.reshape(top, (BLOCK_Q, BLOCK_S * BLOCK_P))
    highest = tl.max(by_query, axis=1)  # never negative: the slot of logit 0
    factor = tl.exp(by_query - highest[:, None])
    parts = tl.reshape(total, (BLOCK_Q, BLOCK_S * BLOCK_P)) * factor
    denominator = tl.exp(-highest) + tl.sum(parts, axis=1)
    share = tl.reshape(factor / denominator[:, None], (LANES,))[:, None]
    own = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    cell = own.to(tl.int64) * HEADS + head
    wanted, sees = (own < rows)[:, None], (newest >= 0)[:, None]
    for half in tl.static_range(2):
        acc = (low if half == 0 else high) * share
        result = tl.sum(tl.reshape(acc, (BLOCK_Q, BLOCK_S * BLOCK_P, HALF)), axis=1)
        at = channel + half * HALF
        result = tl.where(sees, result, 0.0)
        if IGNORE:
            held = tl.load(ignore + head * DIM + at, mask=at < DIM, other=0.0).to(tl.float32)
            result += (tl.exp(-highest) / denominator)[:, None] * held[None, :]
        place = mixed + cell[:, None] * DIM + at[None, :]
        tl.store(place, result, mask=wanted & (at < DIM)[None, :])
    tl.store(lse + cell, highest + tl.log(denominator), mask=own < rows)


@jit
def _few_kernel(
    values, offsets, logits, offset_table, logit_table, reference, images, parts, sums, tops,
    queries, slots, image_size, offsets_row, logits_row, offset_table_row, logit_table_row,
    reference_group, reference_query,
    HEADS: tl.constexpr, POINTS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr,
    HEIGHTS: tl.constexpr, WIDTHS: tl.constexpr, STARTS: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The partial result of one query and head for one level of some slots."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    height, width, start, scale = _level(part % LEVELS, LEVELS, HEIGHTS, WIDTHS, STARTS, SCALES)
    lane = tl.arange(0, BLOCK_S * BLOCK_P)
    slot, point = part // LEVELS * BLOCK_S + lane // BLOCK_P, lane % BLOCK_P
    real = (slot < slots) & (point < POINTS)
    image = tl.load(images + (row // queries) * slots + slot, mask=real, other=-1)
    seen = image >= 0
    own_x, own_y = _own_offset(offsets, row, (head * POINTS + point) * 2, real, offsets_row)
    more_x, more_y = _own_offset(offset_table, slot, (head * POINTS + point) * 2, seen, offset_table_row)
    centre_x, centre_y = _reference(reference, row, row >= 0, queries, reference_group, reference_query)
    column = (head * LEVELS + part % LEVELS) * POINTS + point
    logit = _logit(logits, logit_table, row, slot, column, seen, logits_row, logit_table_row)
    top = tl.maximum(tl.max(logit, axis=0), -1.0e30)  # a part may have no visible image
    weight = tl.exp(logit - top)
    left, _, x_near, x_far = _neighbours(centre_x * width + (own_x + more_x) * scale - 0.5, width)
    above, _, y_near, y_far = _neighbours(centre_y * height + (own_y + more_y) * scale - 0.5, height)
    STRIDE: tl.constexpr = HEADS * DIM
    right, below = tl.where(width > 1, STRIDE, 0), tl.where(height > 1, width * STRIDE, 0)
    corner = tl.maximum(image, 0).to(tl.int64) * image_size + head * DIM + (start + above * width + left) * STRIDE
    channel = tl.arange(0, BLOCK_D)
    wanted = seen[:, None] & (channel < DIM)[None, :]
    acc = tl.zeros([BLOCK_S * BLOCK_P, BLOCK_D], tl.float32)
    for number in tl.static_range(4):
        share = weight * (y_far if number // 2 == 1 else y_near) * (x_far if number % 2 == 1 else x_near)
        place = corner + (number // 2 * below + number % 2 * right)
        tile = tl.load(values + place[:, None] + channel[None, :], mask=wanted, other=0.0)
        acc += share[:, None] * tile.to(tl.float32)
    index = (row * HEADS + head) * PARTS + part
    tl.store(parts + index * DIM + channel, tl.sum(acc, axis=0), mask=channel < DIM)
    tl.store(sums + index, tl.sum(weight, axis=0))
    tl.store(tops + index, top)


@jit
def _join_kernel(
    parts, sums, tops, ignore, mixed, lse,
    HEADS: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr, ALL_PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
    IGNORE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Combine the parts of one query and head with the slot of logit 0."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    cell = tl.program_id(0)
    part, channel = tl.arange(0, ALL_PARTS), tl.arange(0, BLOCK_D)
    here, at = part < PARTS, channel < DIM
    top = tl.load(tops + cell * PARTS + part, mask=here, other=-1.0e30)
    highest = tl.maximum(tl.max(top, axis=0), 0.0)
    factor = tl.exp(top - highest)
    total = tl.sum(factor * tl.load(sums + cell * PARTS + part, mask=here, other=0.0), axis=0)
    denominator = tl.exp(-highest) + total
    place = (cell * PARTS + part)[:, None] * DIM + channel[None, :]
    summed = tl.load(parts + place, mask=here[:, None] & at[None, :], other=0.0)
    result = tl.sum((factor / denominator)[:, None] * summed, axis=0)
    if IGNORE:
        held = tl.load(ignore + cell % HEADS * DIM + channel, mask=at, other=0.0).to(tl.float32)
        result += tl.exp(-highest) / denominator * held
    tl.store(mixed + cell * DIM + channel, result, mask=at)
    tl.store(lse + cell, highest + tl.log(denominator))


def _forward_few(launch: _Launch, held: Tensor, mixed: Tensor, lse: Tensor, ignore: bool) -> None:
    """Run the kernels for few queries, whose slots and levels are spread over programs to fill the device."""
    rows, *sizes = launch.sizes
    heads, dim = mixed.shape[2:]
    fixed = {name: launch.options[name] for name in (*FIXED, "BLOCK_P", "BLOCK_D")}
    count = fixed["LEVELS"] * cdiv(sizes[1], FEW_SLOTS)
    parts = torch.empty((rows, heads, count, dim), dtype=torch.float32, device=mixed.device)
    sums, tops = (torch.empty((rows, heads, count), dtype=torch.float32, device=mixed.device) for _ in range(2))
    begins = overlap(mixed.device)
    _few_kernel[(rows, heads, count)](
        *launch.inputs, parts, sums, tops, *sizes, **fixed, BLOCK_S=FEW_SLOTS, PARTS=count, **begins
    )
    _join_kernel[(rows * heads,)](
        parts, sums, tops, held, mixed, lse, HEADS=heads, DIM=dim, PARTS=count,
        ALL_PARTS=next_power_of_2(count), BLOCK_D=fixed["BLOCK_D"], IGNORE=ignore, **begins,
    )  # fmt: skip


def forward(
    values: Tensor, offsets: Tensor, *others: Any, ignore: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mixed samples and log-sum-exp; see `mmfs_attention_kernel`."""
    groups, queries, _ = offsets.shape
    heads, dim = values.shape[2:]
    mixed = values.new_empty((groups, queries, heads, dim), dtype=dtype)
    lse = values.new_empty((groups, queries, heads), dtype=torch.float32)
    launch = _launch(values, offsets, *others, direction="forward")
    held = lse if ignore is None else ignore.contiguous()
    with torch.cuda.device_of(values):
        if launch.few:
            _forward_few(launch, held, mixed, lse, ignore is not None)
        else:
            _forward_kernel[launch.grid](
                *launch.inputs, held, mixed, lse, *launch.sizes, **launch.options, IGNORE=ignore is not None
            )
    return mixed, lse
