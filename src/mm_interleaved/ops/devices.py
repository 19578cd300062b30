"""Where operators choose Triton kernels by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_shapes_only = False


@contextmanager
def shapes_as_on_cuda() -> Iterator[None]:
    """Inside, operators on all devices compute only shapes, those of the kernels that they run on CUDA devices.

    For tensors without content (`FakeTensorMode`), to find out what a step allocates; Triton need not be installed.
    """
    global _shapes_only
    before, _shapes_only = _shapes_only, True
    try:
        yield
    finally:
        _shapes_only = before


def shapes_only() -> bool:
    """Whether operators compute only shapes, see `shapes_as_on_cuda`."""
    return _shapes_only


def chooses_kernels(device: torch.device) -> bool:
    """Whether operators run kernels on `device` by default: on CUDA devices, not in Triton's interpreter."""
    return device.type == "cuda" or _shapes_only
