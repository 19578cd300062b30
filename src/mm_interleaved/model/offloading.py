"""Parts of a model that take turns on a device which is too small for all of them.

`offload` leaves the weights of the visual tokenizer, the language model and the image decoder in main memory. When a
module of one of them is called, this part is copied to the device, and the one before is dropped there. A part stays
until another one is needed, so a text and an image cost one copy each, not one a token and a step.

The calls are intercepted by hooks of accelerate. No fast path reads a weight past a module with hooks, so every use of
a part is seen; captured graphs and decoding kernels are not used.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

PARTS = ("visual_tokenizer", "language_model", "image_decoder")


class Offloader:
    """The parts of a model and the one that is on the device.

    Attributes:
        device: the device that computes.
        resident: name of the part on the device; None: no part was called yet.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device, self.resident = device, None
        self._home = {name: _tensors(model.get_submodule(name)) for name in PARTS}
        self._away: list[tuple[dict[str, Any], str, Any]] = []

    resident: str | None

    @torch.no_grad()
    def bring(self, name: str) -> None:
        """Have the part of this name on the device, and no other one."""
        if name == self.resident:
            return
        for holder, key, tensor in self._away:
            holder[key] = tensor
        self._away, self.resident = [], None  # frees the device's memory before more is taken
        self._away = self._home[name]
        copies: dict[int, Tensor] = {}  # shared weights stay shared
        for holder, key, tensor in self._away:
            if id(tensor) not in copies:
                copy = tensor.to(self.device)
                parameter = isinstance(tensor, nn.Parameter)
                copies[id(tensor)] = nn.Parameter(copy, requires_grad=False) if parameter else copy
            holder[key] = copies[id(tensor)]
        self.resident = name


class _PartHook(ModelHook):
    """Before a module's forward: its part on the device."""

    def __init__(self, offloader: Offloader, part: str) -> None:
        self.offloader, self.part = offloader, part
        self.execution_device = offloader.device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.offloader.bring(self.part)
        return args, kwargs


class _ModelHook(ModelHook):
    """Says where the model computes, see `placement.compute_device`."""

    def __init__(self, device: torch.device) -> None:
        self.execution_device = device


def offload(model: nn.Module, device: torch.device | str) -> Offloader:
    """Let the parts of `model` take turns on `device`; everything else is moved there.

    The weights must not be changed, and the model must not be moved or trained afterwards.

    Args:
        model: an `MMInterleavedModel`; its parts are moved to the CPU.
        device: the device that computes.
    """
    device = torch.device(device)
    for name in PARTS:
        model.get_submodule(name).to("cpu")
    for name, child in model.named_children():
        if name not in PARTS:
            child.to(device)
    offloader = Offloader(model, device)
    for part in PARTS:
        for module in model.get_submodule(part).modules():
            if module._parameters or module._buffers:
                add_hook_to_module(module, _PartHook(offloader, part), append=True)
    add_hook_to_module(model, _ModelHook(device), append=True)
    return offloader


def _tensors(part: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """The parameters and buffers of a part: the dictionary of each, its key there, and the tensor."""
    return [(held, key, tensor) for module in part.modules() for held in (module._parameters, module._buffers)
            for key, tensor in held.items() if tensor is not None]  # fmt: skip
