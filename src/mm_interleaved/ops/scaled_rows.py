"""Matrices of one byte a number, each row with its own scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaledRows:
    """A matrix as whole numbers or 8-bit floats, each row with its own scale.

    Attributes:
        data: [outputs, width] int8 or float8_e4m3fn.
        scale: [outputs], what the numbers are multiplied by.
    """

    data: Tensor
    scale: Tensor

    def __len__(self) -> int:
        return len(self.data)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The matrix [outputs, width] that is meant."""
        return self.data.to(dtype) * self.scale.to(dtype)[:, None]


Weights = Tensor | ScaledRows
