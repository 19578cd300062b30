"""The device of a model whose weights accelerate has offloaded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def compute_device(model: nn.Module) -> torch.device:
    """The device of inputs: that of the weights in memory, or the one that offloaded weights are moved to."""
    own = next(_execution_devices(model), None)
    if own is not None:
        return own
    found = next((p.device for p in model.parameters() if not p.is_meta), None)
    if found is None:  # `cpu_offload` and `disk_offload` put hooks only on modules with weights
        found = next((device for module in model.modules() for device in _execution_devices(module)), None)
    return torch.device("meta") if found is None else found


def _execution_devices(module: nn.Module) -> Iterator[torch.device]:
    """The execution devices of accelerate's hooks on `module`."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        device = getattr(part, "execution_device", None)
        if device is not None:
            yield torch.device(device)
