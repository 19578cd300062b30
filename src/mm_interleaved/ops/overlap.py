"""Kernels that begin while the one before them ends: programmatic dependent launch, on Hopper and later.

Such a kernel says at its start that the next one may begin (`gdc_launch_dependents`), and waits for the one before it
(`gdc_wait`) before it reads anything that the kernels just before it make. What it reads earlier must be older, as
weights are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

OVERLAP = True


@cache
def overlap(device: torch.device) -> dict[str, Any]:
    """Options of a launch on `device`: whether its kernel overlaps, and what the launch must be told then."""
    if OVERLAP and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}
