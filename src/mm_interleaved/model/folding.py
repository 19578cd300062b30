"""Query maps of MMFS that were folded once and serve until the weights change."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from .mmfs import MMFS, FoldedQuery


class FoldOnce:
    """Keeps `mmfs.fold()`, which depends on weights only and takes two large products in float32.

    A part of the module that owns the MMFS, it holds one folding and no weights: whoever loads, moves or trains the
    weights gets another one, and when the module goes, it goes. A change is known by where weights lie and by PyTorch's
    count of writes to them. A write through `parameter.data` is not counted; hence `forget`, for steps of training.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._kept: FoldedQuery | None = None

    def of(self, mmfs: MMFS) -> FoldedQuery | None:
        """The folded query side; None if the weights are not at hand (offloaded)."""
        weights = [
            *mmfs.dynamic_offset_mask.parameters(), *mmfs.sampling_offsets.parameters(),
            *mmfs.attention_weights.parameters(), *mmfs.query_relpos.parameters(),
        ]  # fmt: skip
        if any(w.is_meta for w in weights):
            return None
        if any(w.is_inference() for w in weights) or torch.is_grad_enabled():
            return mmfs.fold()  # nobody counts writes to the former; gradients want a graph of their own
        key = tuple(_state(w) for w in weights)
        if self._kept is None or key != self._key:
            self._kept = None  # before another one is made
            self._kept, self._key = mmfs.fold(), key
        return self._kept

    def forget(self) -> None:
        """Fold anew the next time."""
        if self._kept is not None:
            self._kept = self._key = None

    def __deepcopy__(self, memo: object) -> FoldOnce:
        """A copy of the module has weights of its own."""
        return FoldOnce()


def _state(weight: Tensor) -> Hashable:
    return weight.data_ptr(), weight._version, weight.device, weight.dtype, weight.shape
