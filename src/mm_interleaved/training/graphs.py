"""A training step recorded as CUDA graphs: started once, instead of kernel by kernel.

A small model's step is some ten thousand short kernels, and a host needs longer to start them than a GPU to run them.
`RecordedForward` records forward and backward at one set of sizes (`torch.cuda.make_graphed_callables`) and replays
them; the optimizer's step, a few fused kernels, stays outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.layout import Layout
from ..model.mm_interleaved import MMInterleavedOutput
from .config import ShapesConfig

_PARTS = ("loss", "loss_txt", "loss_img")


class RecordedForward:
    """Calls a model through recorded graphs wherever the sizes fit, and as it is elsewhere.

    What is no tensor (weights of losses, whether rows are padded) is part of a recording, as are all sizes. Batches
    that differ from the first fitting one in any of that run unrecorded.

    A model that computes under autocast must enter it within its own forward, as `accelerate` has it: the casts of the
    weights are then part of the recording. Kept from outside, they would be the weights of the recording's day.

    Args:
        shapes: what a batch must have to be recorded.
    """

    def __init__(self, shapes: ShapesConfig) -> None:
        self.shapes = shapes
        self.replayed, self.unrecorded = 0, 0
        self._key: tuple[Any, ...] | None = None
        self._graphed: nn.Module | None = None

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> MMInterleavedOutput:
        """As `model(**inputs)`, but of the results only the losses, and a gradient for `loss` alone."""
        key = tuple(_key(inputs))
        if self._graphed is None and self._fits(inputs):
            self._key, self._graphed = key, self._record(model, inputs)
        if self._graphed is None or key != self._key:
            self.unrecorded += 1
            return model(**inputs)
        self.replayed += 1
        found = self._graphed(*tensors_of(inputs))
        return MMInterleavedOutput(**dict(zip(self._graphed.names, found, strict=True)))

    def _fits(self, inputs: dict[str, Any]) -> bool:
        layout: Layout = inputs["layout"]
        sizes = {
            "pictures": len(inputs["pixel_values"]),
            "drawn": len(layout.drawn),
            "conditioning": len(layout.conditioning),
            "context": layout.context_length,
            "labelled": 0 if layout.labelled is None else len(layout.labelled),
            "visible": layout.visible.images.shape[1],
        }
        return all(getattr(self.shapes, name) == size for name, size in sizes.items())

    def _record(self, model: nn.Module, inputs: dict[str, Any]) -> nn.Module:
        if torch.is_autocast_enabled("cuda"):
            raise RuntimeError("a recording under autocast would keep the weights as they are now")
        return torch.cuda.make_graphed_callables(
            _Flat(model, inputs), tuple(tensors_of(inputs)), allow_unused_input=True
        )


class _Flat(nn.Module):
    """The model as a function of tensors alone."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs
        self.names: list[str] = []

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The losses that there are, `loss` first."""
        outputs = self.model(**_rebuilt(self.inputs, iter(tensors)))
        found = {name: getattr(outputs, name) for name in _PARTS}
        self.names = [name for name, value in found.items() if value is not None]
        return tuple(found[name] if name == "loss" else found[name].detach() for name in self.names)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in (nested) dictionaries and dataclasses, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for name in sorted(value):
            yield from tensors_of(value[name])
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


def _rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """`value` with other tensors."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        made = {name: _rebuilt(value[name], tensors) for name in sorted(value)}
        return {name: made[name] for name in value}
    if is_dataclass(value):
        return replace(value, **{f.name: _rebuilt(getattr(value, f.name), tensors) for f in fields(value)})
    return value


def _key(value: Any) -> Iterator[Any]:
    """Everything that a recording depends on."""
    if isinstance(value, Tensor):
        yield value.shape, value.dtype
    elif isinstance(value, dict):
        for name in sorted(value):
            yield name
            yield from _key(value[name])
    elif is_dataclass(value):
        for field in fields(value):
            yield from _key(getattr(value, field.name))
    else:
        yield value
