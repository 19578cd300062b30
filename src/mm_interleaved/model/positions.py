"""Sine-cosine position tables. They hold no learned number, so checkpoints leave them out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sincos_1d(positions: np.ndarray, width: int) -> np.ndarray:
    """[sin(p * w_k) | cos(p * w_k)] with w_k = 10000^(-2k / width): float32 [positions, width].

    In float32 on purpose: the release computed its tables so, and this way they agree to the last bit.
    """
    k = np.arange(width // 2, dtype=np.float32)
    angles = np.outer(positions.astype(np.float32), 1 / 10000 ** (k / (width / 2.0)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1, dtype=np.float32)


def sincos_2d(side: int, width: int) -> np.ndarray:
    """Table of a square grid: float32 [side * side, width], the first half of the width for the row index."""
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    halves = [sincos_1d(axis.reshape(-1), width // 2) for axis in (rows, columns)]
    return np.concatenate(halves, axis=1)


def resize_grid(table: Tensor, side: int) -> Tensor:
    """A square grid table [n * n, width] resized bicubically to [side * side, width], in float32."""
    source = int(table.shape[0] ** 0.5)
    if source == side:
        return table
    grid = table.float().T.reshape(1, -1, source, source)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid.flatten(2)[0].T


def _line(length: int, width: int) -> Tensor:
    return torch.from_numpy(sincos_1d(np.arange(length), width))


def _grid(side: int, width: int, resize_to: int) -> Tensor:
    return resize_grid(torch.from_numpy(sincos_2d(side, width)), resize_to)


class PositionTable(nn.Module):
    """A fixed table, held as a buffer that is not saved; `reset_parameters` fills it.

    Args:
        table: computes the float32 values; a function that can be pickled, as models are.
        shape: (rows, channels) of what `table` returns.
    """

    def __init__(self, table: Callable[[], Tensor], shape: tuple[int, int]) -> None:
        super().__init__()
        self._compute = table
        self.table: Tensor
        self.register_buffer("table", torch.empty(shape), persistent=False)
        self.reset_parameters()

    @classmethod
    def line(cls, length: int, width: int) -> PositionTable:
        """1-D positions 0 to length - 1."""
        return cls(partial(_line, length, width), (length, width))

    @classmethod
    def grid(cls, side: int, width: int, resize_to: int | None = None) -> PositionTable:
        """A square grid, resized to another side if asked."""
        size = resize_to or side
        return cls(partial(_grid, side, width, size), (size * size, width))

    def reset_parameters(self) -> None:
        """Compute the table; on the meta device there is nothing to fill."""
        if not self.table.is_meta:
            with torch.no_grad():
                self.table.copy_(self._compute())

    def forward(self) -> Tensor:
        """The table [rows, channels]."""
        return self.table
