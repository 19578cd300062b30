"""Multi-scale deformable attention: a weighted sum of bilinear samples from feature maps of several sizes.

    out[b, q, h] = sum over levels l and points p of
                   weights[b, q, h, l, p] * bilinear(value_l[b, :, h], locations[b, q, h, l, p])

Locations are (x, y) in units of the map's width and height. The centre of pixel (i, j) of an h x w map lies at
((j + 0.5) / w, (i + 0.5) / h). Everything outside of a map counts as zero (Deformable DETR, arXiv 2010.04159, eq. 3).

`deformable_attention` samples maps with `grid_sample`. On a CPU, if no gradients are needed, it sums rows of `value`
instead. `deformable_attention_reference` computes the four neighbours explicitly; both are tested against it.

Axes: B batch, S spatial positions of all levels, Q queries, N heads, V levels, P points, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = Sequence[tuple[int, int]]  # (height, width) of every level
ROWS_AT_A_TIME = 2048  # on a CPU: half a megabyte of indices and of weights


def promote(dtype: torch.dtype) -> torch.dtype:
    """The type for locations, logits and sums: float32 for half precision, `dtype` itself otherwise."""
    return torch.promote_types(dtype, torch.float32)


def deformable_attention(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample `value` at `locations` and sum with `weights`.

    Args:
        value: [B, S, N, D], the levels one after the other, each row-major.
        shapes: (height, width) of every level.
        locations: [B, Q, N, V or 1, P, 2]; 1 when all levels share their locations.
        weights: [B, Q, N, V, P].

    Returns:
        [B, Q, N * D] in the type of `value`; sums run in float32 or better.
    """
    form = sum_rows if _rows_are_quicker(value, shapes, locations, weights) else sample_maps
    return form(value, shapes, locations, weights)


def sample_maps(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """`deformable_attention` by PyTorch's `grid_sample`, one map at a time. Works on every device, with gradients."""
    batch, _, heads, dim = value.shape
    queries, points = weights.shape[1], weights.shape[-1]
    work = promote(value.dtype)
    grids = (2 * locations.to(work) - 1).expand(-1, -1, -1, len(shapes), -1, -1)
    maps = value.to(work).split([height * width for height, width in shapes], dim=1)
    total = value.new_zeros((batch * heads, dim, queries), dtype=work)
    for level, ((height, width), level_map) in enumerate(zip(shapes, maps, strict=True)):
        image = level_map.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        # Queries are the last axis, so that the sum over the few points runs along contiguous rows.
        grid = grids[:, :, :, level].permute(0, 2, 3, 1, 4).reshape(batch * heads, points, queries, 2)
        samples = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weight = weights[:, :, :, level].to(work).permute(0, 2, 3, 1).reshape(batch * heads, 1, points, queries)
        total = total + (samples * weight).sum(2)
    return total.view(batch, heads * dim, queries).transpose(1, 2).to(value.dtype)


def _rows_are_quicker(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> bool:
    """Whether `sum_rows` is faster: on a CPU, where `grid_sample` fetches channels one by one, from 16 channels on."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (value, locations, weights))
    return (
        value.device.type == "cpu"
        and value.dtype == locations.dtype == weights.dtype == torch.float32
        and value.shape[-1] >= 16
        and 0 < value.numel() < 2**31
        and weights.numel() > 0
        and min(min(shape) for shape in shapes) > 1
        and not (learns or torch.compiler.is_compiling())
    )


def sum_rows(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """`deformable_attention` as weighted sums of rows of `value`, one for each of a sample's four neighbours.

    Column c has the bilinear weight max(0, 1 - |x - c|) for a sample at x. The left neighbour is clamped to the second
    to last column, so that both neighbours exist; for samples outside of the map the weights are 0.
    """
    (batch, positions, heads, dim), (queries, levels, points) = value.shape, (weights.shape[i] for i in (1, 3, 4))
    sides = torch.tensor([[width for _, width in shapes], [height for height, _ in shapes]], dtype=torch.int32)
    sides = sides[:, :, None, None]
    begins = torch.tensor([[0, *(h * w for h, w in shapes[:-1])]], dtype=torch.int32).cumsum(1, dtype=torch.int32)
    width, begins = sides[0], begins.view(-1, 1, 1)
    neighbours = torch.stack([torch.zeros_like(width), torch.ones_like(width), width, width + 1]) * heads
    first = torch.arange(batch, dtype=torch.int32)[:, None] * (positions * heads)
    first = (first + torch.arange(heads, dtype=torch.int32))[:, None].expand(-1, queries, -1).reshape(-1)
    table, parts = value.reshape(-1, dim), []
    # Blocks fit into the processor's caches. Queries are last in memory, because all steps but the last run along them.
    blocks = (x.reshape(len(first), *x.shape[3:]).split(ROWS_AT_A_TIME) for x in (locations, weights))
    for place, weight, start in zip(*blocks, first.split(ROWS_AT_A_TIME), strict=True):
        x = place.permute(3, 1, 2, 0).contiguous() * sides  # [x or y, levels, points, rows]
        x -= 0.5
        cell = torch.minimum(x.int().clamp_(min=0), sides - 2)
        x -= cell
        shares = torch.stack([x, x - 1]).abs_().neg_().add_(1).clamp_(min=0)
        rows = shares[:, 1] * weight.permute(1, 2, 0).contiguous()
        share = rows[:, None] * shares[:, 0]  # [upper or lower, left or right, levels, points, rows]
        index = cell[1].mul_(width).add_(cell[0]).add_(begins).mul_(heads).add_(start) + neighbours
        bags, factors = (y.reshape(4 * levels * points, -1).t().contiguous() for y in (index, share))
        parts.append(F.embedding_bag(bags, table, mode="sum", per_sample_weights=factors))
    return torch.cat(parts).view(batch, queries, heads * dim)


def deformable_attention_reference(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The reference implementation of `deformable_attention`: it indexes each of the four neighbours."""
    batch, _, heads, dim = value.shape
    queries, points = weights.shape[1], weights.shape[-1]
    locations = locations.expand(-1, -1, -1, len(shapes), -1, -1)
    batch_index = torch.arange(batch, device=value.device).view(batch, 1, 1, 1)
    head_index = torch.arange(heads, device=value.device).view(1, 1, heads, 1)
    total = value.new_zeros((batch, queries, heads, dim))
    start = 0
    for level, (height, width) in enumerate(shapes):
        x = locations[:, :, :, level, :, 0] * width - 0.5  # [B, Q, N, P]
        y = locations[:, :, :, level, :, 1] * height - 0.5
        left, top = x.floor(), y.floor()
        for column in (left, left + 1):
            for row in (top, top + 1):
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                share = (1 - (x - column).abs()) * (1 - (y - row).abs()) * inside
                index = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long() + start
                neighbour = value[batch_index, index, head_index]  # [B, Q, N, P, D]
                total = total + ((weights[:, :, :, level] * share)[..., None] * neighbour).sum(-2)
        start += height * width
    assert start == value.shape[1]
    assert points == locations.shape[-2]
    return total.flatten(2)
