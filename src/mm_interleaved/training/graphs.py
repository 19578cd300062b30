"""A training step captured as a CUDA graph: started once, instead of kernel by kernel.

A small model's step is some ten thousand short kernels, and a host needs longer to start them than a GPU to run them.
`CapturedStep` records forward and backward at one set of sizes and replays them; clipping and the optimizer's step, a
few fused kernels, stay outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from ..model.layout import Layout
from ..model.static import capture
from .config import ShapesConfig
from .distillation import DistilledOutput

_PARTS = ("loss", "loss_txt", "loss_img", "loss_distillation")
Compute = Callable[[Callable[..., Any], dict[str, Any]], Any]  # (model, its arguments) to its output with all losses
_AS_WRITTEN = partial(torch.compiler.set_stance, "force_eager")  # what is compiled is so for the capture's sizes


class CapturedStep:
    """Calls a model, with its backward pass, by a replay wherever the sizes fit, and as it is elsewhere.

    What is no tensor (weights of losses, whether rows are padded) is part of a capture, as are all sizes. Batches
    that differ from the first fitting one in any of that run uncaptured.

    A model that computes under autocast must enter it within its own forward, as `accelerate` has it: the casts of the
    weights are then part of the capture. Kept from outside, they would be the weights of the capture's day.

    With several processes each records its own step, past `DistributedDataParallel`'s hooks, and their gradients are
    averaged afterwards in one piece; what a process did not use counts as 0.

    Activations are kept for the backward pass: gradient checkpointing would compute them anew from other weights.

    Args:
        shapes: what a batch must have to be captured.
        world_size: processes that train together.
        compute: calls the model and adds losses to its output.
    """

    def __init__(
        self, shapes: ShapesConfig, world_size: int = 1, compute: Compute = lambda model, inputs: model(**inputs)
    ) -> None:
        self.shapes, self.world_size, self.compute = shapes, world_size, compute
        self.replayed, self.uncaptured = 0, 0
        self._recording: _Capture | None = None

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> DistilledOutput:
        """As `compute(model, inputs)`, but of the results only the losses. `loss.backward()` must follow, unscaled.

        After a replay, and with several processes, the gradients are there already, and `backward` does nothing.
        """
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if self._recording is None and self._fits(inputs):
            self._recording = _Capture(model, inputs, self.compute)
        capture = self._recording
        fits = capture is not None and capture.key == tuple(_key(inputs))
        self.replayed, self.uncaptured = self.replayed + fits, self.uncaptured + (not fits)
        if not fits and self.world_size == 1:
            with _AS_WRITTEN():
                return self.compute(model, inputs)
        if capture is not None and fits:
            losses, gradients, used = capture.replay(inputs)
        else:
            with _AS_WRITTEN():
                losses, gradients, used = _computed(model, inputs, self.compute)
        parameters = _trained(model).values()
        if self.world_size > 1:
            gradients /= self.world_size
            dist.all_reduce(gradients)
            used = [True] * len(used)
        for p, gradient, it_is in zip(parameters, gradients.split([p.numel() for p in parameters]), used, strict=True):
            p.grad = gradient.view_as(p) if it_is else None
        anchor = torch.zeros((), device=gradients.device, requires_grad=True)
        losses["loss"] = _Done.apply(losses["loss"], anchor)
        return DistilledOutput(**cast("dict[str, Any]", losses))

    def take_share(self) -> float:
        """Share of the steps since the last call that were replays; the counts start anew."""
        share = self.replayed / max(1, self.replayed + self.uncaptured)
        self.replayed, self.uncaptured = 0, 0
        return share

    def _fits(self, inputs: dict[str, Any]) -> bool:
        layout: Layout = inputs["layout"]
        sizes = {
            "images": len(inputs["pixel_values"]),
            "targets": len(layout.target_images),
            "conditioning": len(layout.conditioning_images),
            "context": layout.context_length,
            "labelled": 0 if layout.label_positions is None else len(layout.label_positions),
            "visible": layout.visible.images.shape[1],
        }
        return all(getattr(self.shapes, name) == size for name, size in sizes.items())


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _computed(
    model: nn.Module, inputs: dict[str, Any], compute: Compute
) -> tuple[dict[str, Tensor], Tensor, list[bool]]:
    """Losses, the gradients of everything that is trained in one piece, and what was used."""
    # Other names of the same weights: the weights themselves may have hooks and streams for their gradients, as
    # `DistributedDataParallel` gives them.
    names = {name: p.detach().requires_grad_() for name, p in _trained(model).items()}
    with torch.enable_grad():
        outputs = compute(lambda **arguments: functional_call(model, names, (), arguments), inputs)
    found = torch.autograd.grad(outputs.loss, list(names.values()), allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(names.values(), found, strict=True)]
    parts = {name: outputs.get(name) for name in _PARTS}
    losses = {name: value.detach() for name, value in parts.items() if value is not None}
    return losses, torch.cat([g.flatten() for g in whole]), [g is not None for g in found]


class _Capture:
    """Forward and backward over fixed inputs, losses and gradients."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], compute: Compute) -> None:
        if torch.is_autocast_enabled():
            raise RuntimeError("a capture under autocast would keep the weights as they are now")
        self.key = tuple(_key(inputs))
        self.inputs = _rebuilt(inputs, iter([x.clone() for x in _tensors(inputs)]))
        self.losses, self.gradients, self.used = _computed(model, self.inputs, compute)

        def step() -> None:
            losses, gradients, _ = _computed(model, self.inputs, compute)
            self.gradients.copy_(gradients)
            for name, value in losses.items():
                self.losses[name].copy_(value)

        self._replay = capture(step, self.gradients.device)

    def replay(self, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor, list[bool]]:
        """What `_computed` gives for other inputs; the next replay writes over the gradients."""
        for fixed, given in zip(_tensors(self.inputs), _tensors(inputs), strict=True):
            fixed.copy_(given, non_blocking=True)
        self._replay()
        return {name: value.clone() for name, value in self.losses.items()}, self.gradients, self.used


class _Done(torch.autograd.Function):
    """A loss whose backward pass has happened."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, anchor: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # of one result
        ctx: Any, gradient: Tensor
    ) -> tuple[None, None]:
        return None, None


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in (nested) dictionaries and dataclasses, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for name in sorted(value):
            yield from _tensors(value[name])
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """`value` with other tensors."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {name: _rebuilt(value[name], tensors) for name in sorted(value)}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _rebuilt(getattr(value, f.name), tensors) for f in fields(value)})
    return value


def _key(value: Any) -> Iterator[Any]:
    """Everything that a capture depends on."""
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
