"""Triton kernels of the training of the small model: narrow norms, sums over rows, and layers over each other.

Norms and sums compute in float32 and take many narrow rows at a time. Axes: R rows, D channels.
"""

from __future__ import annotations

import triton.language as tl

from mm_interleaved.ops.typed_triton import jit


@jit
def norm_forward(
    x, weight, bias, y, rows, eps, D: tl.constexpr, CENTRED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < rows) & (channel < D)
    values = tl.load(x + row * D + channel, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        values = tl.where(inside, values - tl.sum(values, 1)[:, None] / D, 0.0)
    scale = 1 / tl.sqrt(tl.sum(values * values, 1)[:, None] / D + eps)
    result = values * scale * tl.load(weight + channel, mask=channel < D, other=0.0).to(tl.float32)
    if CENTRED:
        result += tl.load(bias + channel, mask=channel < D, other=0.0).to(tl.float32)
    tl.store(y + row * D + channel, result, mask=inside)


@jit
def norm_backward(
    x, weight, grad, of_x, of_weight, of_bias, rows, eps, D: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_D)[None, :]
    gain = tl.load(weight + channel, mask=channel < D, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    sum_bias = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    first, step = tl.program_id(0).to(tl.int64) * BLOCK_R, tl.num_programs(0).to(tl.int64) * BLOCK_R
    while first < rows:
        row = first + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < rows) & (channel < D)
        values = tl.load(x + row * D + channel, mask=inside, other=0.0).to(tl.float32)
        incoming = tl.load(grad + row * D + channel, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            values = tl.where(inside, values - tl.sum(values, 1)[:, None] / D, 0.0)
        scale = 1 / tl.sqrt(tl.sum(values * values, 1)[:, None] / D + eps)
        normed = values * scale
        sum_weight += incoming * normed
        sum_bias += incoming
        own = incoming * gain
        own -= normed * (tl.sum(own * normed, 1)[:, None] / D)
        if CENTRED:
            own -= tl.sum(incoming * gain, 1)[:, None] / D
        tl.store(of_x + row * D + channel, own * scale, mask=inside)
        first += step
    place = tl.program_id(0) * D + tl.arange(0, BLOCK_D)
    real = tl.arange(0, BLOCK_D) < D
    tl.store(of_weight + place, tl.sum(sum_weight, 0), mask=real)
    tl.store(of_bias + place, tl.sum(sum_bias, 0), mask=real)


@jit
def add_rows(x, out, rows, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    first, step = tl.program_id(0).to(tl.int64) * BLOCK_R, tl.num_programs(0).to(tl.int64) * BLOCK_R
    while first < rows:
        row = first + tl.arange(0, BLOCK_R)[:, None]
        total += tl.load(x + row * D + channel, mask=(row < rows) & (channel < D), other=0.0).to(tl.float32)
        first += step
    place = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(out + tl.program_id(0) * D + place, tl.sum(total, 0), mask=place < D)


@jit
def compose_tiles(
    out, planes, plane_of, atlas, starts, layers, offsets, SIZE: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    image, tile = tl.program_id(0), tl.program_id(1)
    across: tl.constexpr = (SIZE + TILE - 1) // TILE
    top, left = tile // across * TILE, tile % across * TILE
    rows, columns = top + tl.arange(0, TILE)[:, None], left + tl.arange(0, TILE)[None, :]
    visible = (rows < SIZE) & (columns < SIZE)
    pixel, area = rows * SIZE + columns, SIZE * SIZE
    plane = tl.load(plane_of + image)
    ground = planes + plane * 3 * area + pixel
    painted = visible & (plane >= 0)
    red = tl.load(ground, mask=painted, other=0.0)
    green = tl.load(ground + area, mask=painted, other=0.0)
    blue = tl.load(ground + 2 * area, mask=painted, other=0.0)
    layer, end = tl.load(starts + image), tl.load(starts + image + 1)
    while layer < end:
        row = layers + layer * COLUMNS
        x, y = tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32)
        width, height = tl.load(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32)
        if (x < left + TILE) & (x + width > left) & (y < top + TILE) & (y + height > top):
            mode, stride = tl.load(row + 5).to(tl.int32), tl.load(row + 6).to(tl.int32)
            i, j = rows - y, columns - x
            inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
            place = atlas + tl.load(offsets + layer * COLUMNS) + i * width + j
            alpha = tl.load(place + 3 * stride, mask=inside, other=0.0)
            alpha = tl.where(mode == 2, (alpha > 0.5).to(tl.float32), alpha) * tl.load(row + 7)
            own = inside & (mode == 0)
            tint = tl.where(mode == 0, 0.0, 1.0) * alpha
            red = red * (1 - alpha) + tl.load(place, mask=own, other=0.0) + tint * tl.load(row + 8)
            green = green * (1 - alpha) + tl.load(place + stride, mask=own, other=0.0) + tint * tl.load(row + 9)
            blue = blue * (1 - alpha) + tl.load(place + 2 * stride, mask=own, other=0.0) + tint * tl.load(row + 10)
        layer += 1
    to = out + image * 3 * area + pixel
    tl.store(to, tl.minimum(tl.maximum(red + 0.5, 0.0), 255.0).to(tl.uint8), mask=visible)
    tl.store(to + area, tl.minimum(tl.maximum(green + 0.5, 0.0), 255.0).to(tl.uint8), mask=visible)
    tl.store(to + 2 * area, tl.minimum(tl.maximum(blue + 0.5, 0.0), 255.0).to(tl.uint8), mask=visible)
