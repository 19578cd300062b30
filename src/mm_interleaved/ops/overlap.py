"""Programmatic dependent launch: on Hopper and later, a kernel starts before the previous kernel has ended.

At its start a kernel allows the next one to start (`gdc_launch_dependents`). Before it reads results of the previous
kernels it waits for them (`gdc_wait`). Only data that no recent kernel writes, such as weights, may be read earlier.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

OVERLAP = True


@cache
def overlap(device: torch.device) -> dict[str, Any]:
    """Launch options of kernels on `device`: whether they overlap, and the option of Triton's launcher for it."""
    if OVERLAP and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}
