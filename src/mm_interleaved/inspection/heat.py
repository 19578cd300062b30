"""Heat maps of sampling points.

Axes: N heads, R earlier images, V levels, P points, M points in all, h and w height and width of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image

from .records import Points

SIDE = 64  # cells of a side of a heat map
_COLOURS = np.array(  # of a heat map, from nothing to most: the viridis-like path through blue, green and yellow
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], np.float32
)


def heat_map(
    points: Points, slot: int, levels: Sequence[int], side: int = SIDE, only: Sequence[int] | None = None
) -> np.ndarray:
    """How much each part of an earlier image counts: [side, side], the mean over all first axes and heads.

    A point spreads over the cells of its level that it interpolates between, as bilinear sampling does. The sum is the
    share of the image's weight that lies within it.

    Args:
        points: the points.
        slot: the earlier image, from 0 for the most recent one.
        levels: sides of the levels.
        side: side of the result.
        only: levels that count; None: all.
    """
    heads = points.ignored.size
    places = points.locations[..., slot, :, :].reshape(heads, -1, 2)
    total = np.zeros((side, side), np.float32)
    centres = (np.arange(side, dtype=np.float32) + 0.5) / side
    for index, level in enumerate(levels):
        if only is not None and level not in only:
            continue
        weights = points.weights[..., slot, index, :].reshape(-1)
        across, down = (_spread(places[..., axis].reshape(-1), centres, level) for axis in (0, 1))
        total += np.einsum("m,mh,mw->hw", weights, down, across, optimize=True)
    return total / heads


def _spread(places: np.ndarray, centres: np.ndarray, level: int) -> np.ndarray:
    """[M, cells] the share of each point in each cell along one axis; a point outside of the image loses its share."""
    width = max(1 / level, 1.0 / len(centres))
    shares = np.clip(1 - np.abs(places[:, None] - centres) / width, 0, None)
    return shares / (width * len(centres))


def shares(points: Points) -> dict[str, np.ndarray]:
    """The mean share of each earlier image [R] (`images`), and of the ignore slot (`ignored`, a scalar)."""
    heads = points.ignored.size
    weights = points.weights.reshape(heads, *points.weights.shape[-3:])
    return {"images": weights.sum((-1, -2)).mean(0), "ignored": points.ignored.mean()}


def overlay(image: PIL.Image.Image, heat: np.ndarray, strength: float = 0.75) -> PIL.Image.Image:
    """An image under its heat map [h, w]; the hottest cell has the strongest colour."""
    scaled = heat / max(float(heat.max()), 1e-12)
    position = scaled * (len(_COLOURS) - 1)
    low = np.minimum(position.astype(int), len(_COLOURS) - 2)
    part = (position - low)[..., None]
    colours = _COLOURS[low] * (1 - part) + _COLOURS[low + 1] * part
    alpha = (strength * np.sqrt(scaled) * 255).astype(np.uint8)
    layer = np.concatenate([colours.astype(np.uint8), alpha[..., None]], axis=-1)
    above = PIL.Image.fromarray(layer).resize(image.size, PIL.Image.Resampling.BICUBIC)
    grey = PIL.Image.blend(image.convert("RGB"), image.convert("L").convert("RGB"), 0.5)
    return PIL.Image.alpha_composite(grey.convert("RGBA"), above).convert("RGB")
