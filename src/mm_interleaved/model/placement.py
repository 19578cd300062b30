"""Where a model computes when accelerate has moved its weights away."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def compute_device(model: nn.Module) -> torch.device:
    """Where inputs go: the device of the weights that are in memory, or where offloaded weights are brought."""
    own = next(_execution_devices(model), None)
    if own is not None:
        return own
    found = next((p.device for p in model.parameters() if not p.is_meta), None)
    if found is None:  # `cpu_offload` and `disk_offload` tell only the modules that hold weights
        found = next((device for module in model.modules() for device in _execution_devices(module)), None)
    return torch.device("meta") if found is None else found


def _execution_devices(module: nn.Module) -> Iterator[torch.device]:
    """The devices that accelerate's hooks of `module` itself name."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        device = getattr(part, "execution_device", None)
        if device is not None:
            yield torch.device(device)
