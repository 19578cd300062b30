"""Weights of 8 bits, with one scale for each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaledRows:
    """A matrix of 8-bit integers or floats with one scale for each row.

    Attributes:
        data: [outputs, width] int8 or float8_e4m3fn.
        scale: [outputs], the factor of each row.
    """

    data: Tensor
    scale: Tensor

    def __len__(self) -> int:
        return len(self.data)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The matrix [outputs, width] in `dtype`: data times scale."""
        return self.data.to(dtype) * self.scale.to(dtype)[:, None]


Weights = Tensor | ScaledRows
