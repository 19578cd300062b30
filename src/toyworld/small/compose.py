"""Layers over each other, for many images at once: one Triton kernel, and the same in NumPy for a CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .layers import (
    COLUMNS,
    CUT,
    HEIGHT,
    LEFT,
    MODE,
    OFFSET,
    OPACITY,
    PAINTED,
    RED,
    STRIDE,
    TOP,
    WIDTH,
    Atlas,
    LayeredImages,
)

TILE = 32


class Composer:
    """Draws layered images on a device.

    Args:
        atlas: what they show.
        device: where to draw; its copy of the atlas stays there.
    """

    def __init__(self, atlas: Atlas, device: torch.device) -> None:
        self.atlas, self.device = atlas, device
        self.values = torch.from_numpy(atlas.values).to(device)
        self.planes = torch.from_numpy(atlas.planes).to(device)

    def __call__(self, images: LayeredImages, out: Tensor | None = None) -> Tensor:
        """uint8 [I, 3, size, size], written into `out` if it is given."""
        side, count = self.atlas.size, len(images.planes)
        out = torch.empty(count, 3, side, side, dtype=torch.uint8, device=self.device) if out is None else out
        if self.device.type != "cuda":
            out.copy_(torch.from_numpy(compose_reference(self.atlas, images)))
            return out
        # `.pin_memory()` of a few hundred kilobytes lets the copies run beside the GPU's work
        planes, starts, layers = (
            torch.from_numpy(x).pin_memory().to(self.device, non_blocking=True)
            for x in (images.planes, images.starts, images.layers)
        )
        from .kernels import compose_tiles

        tiles = -(-side // TILE)
        compose_tiles[(count, tiles * tiles)](
            out, self.planes, planes, self.values, starts, layers, layers.view(torch.int32), side, COLUMNS, TILE,
        )  # fmt: skip
        return out


def compose_reference(atlas: Atlas, images: LayeredImages) -> np.ndarray:
    """uint8 [I, 3, size, size]."""
    side = atlas.size
    out = np.empty((len(images.planes), 3, side, side), np.uint8)
    for number, plane in enumerate(images.planes.tolist()):
        canvas = atlas.planes[plane].copy() if plane >= 0 else np.zeros((3, side, side), np.float32)
        for row in images.layers[images.starts[number] : images.starts[number + 1]]:
            _lay(canvas, atlas.values, row)
        out[number] = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return out


def _lay(canvas: np.ndarray, values: np.ndarray, row: np.ndarray) -> None:
    offset, side = int(row[OFFSET : OFFSET + 1].view(np.int32)[0]), canvas.shape[-1]
    x, y, width, height, stride = (int(row[i]) for i in (LEFT, TOP, WIDTH, HEIGHT, STRIDE))
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, side), min(y + height, side)
    if x0 >= x1 or y0 >= y1:
        return
    part = np.s_[y0 - y : y1 - y, x0 - x : x1 - x]

    def plane(number: int) -> np.ndarray:
        begin = offset + number * stride
        return values[begin : begin + width * height].reshape(height, width)[part]

    alpha = plane(3 if row[MODE] == PAINTED else 0)
    alpha = ((alpha > 0.5) if row[MODE] == CUT else alpha) * row[OPACITY]
    color = np.stack([plane(c) for c in range(3)]) if row[MODE] == PAINTED else row[RED : RED + 3, None, None] * alpha
    here = canvas[:, y0:y1, x0:x1]
    here *= 1 - alpha
    here += color
