"""A training step as a CUDA graph: one launch instead of one for each kernel.

The step of a small model has some ten thousand short kernels, and the host takes longer to launch them than a GPU to
run them. `CapturedStep` captures the forward and backward pass for one set of sizes and replays it. Gradient clipping
and the optimizer's step, a few fused kernels, are not captured.
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
_AS_WRITTEN = partial(torch.compiler.set_stance, "force_eager")  # compiled code is for the sizes of the capture only


class CapturedStep:
    """Runs the forward and backward pass of a model: by a replay if the sizes fit, otherwise uncaptured.

    A capture depends on all sizes and on all arguments that are not tensors (loss weights, whether rows are padded). A
    batch that differs in any of them from the first one that fits runs uncaptured.

    A model that computes under autocast must enter it in its own forward, as `accelerate` does, so that the casts of
    the weights are part of the capture. Casts from outside would keep the weights of the time of the capture.

    With several processes each captures its own step, without `DistributedDataParallel`'s hooks, and gradients are
    averaged afterwards in one piece; parameters that a process did not use count as 0.

    Activations are kept for the backward pass: gradient checkpointing would recompute them from other weights.

    Args:
        shapes: sizes of the batches that are captured.
        world_size: number of training processes.
        compute: calls the model and adds losses to its output.
    """

    def __init__(
        self, shapes: ShapesConfig, world_size: int = 1, compute: Compute = lambda model, inputs: model(**inputs)
    ) -> None:
        self.shapes, self.world_size, self.compute = shapes, world_size, compute
        self.replayed, self.uncaptured = 0, 0
        self._capture: _Capture | None = None

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> DistilledOutput:
        """The losses of `compute(model, inputs)`. `loss.backward()` must follow, unscaled.

        After a replay, and with several processes, the gradients exist already, and `backward` does nothing.
        """
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if self._capture is None and self._fits(inputs):
            self._capture = _Capture(model, inputs, self.compute)
        capture = self._capture
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
        """The share of replays in the steps since the last call; resets the counts."""
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
    """Losses, the gradients of all trained parameters in one tensor, and which parameters were used."""
    # Views of the weights, because the weights themselves may have hooks and streams for their gradients, from
    # `DistributedDataParallel`.
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
            raise RuntimeError("a capture under autocast would keep the present weights")
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
        """The result of `_computed` for other inputs; the next replay overwrites the gradients."""
        for fixed, given in zip(_tensors(self.inputs), _tensors(inputs), strict=True):
            fixed.copy_(given, non_blocking=True)
        self._replay()
        return {name: value.clone() for name, value in self.losses.items()}, self.gradients, self.used


class _Done(torch.autograd.Function):
    """A loss whose backward pass was already run."""

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
    """`value` with its tensors replaced."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {name: _rebuilt(value[name], tensors) for name in sorted(value)}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _rebuilt(getattr(value, f.name), tensors) for f in fields(value)})
    return value


def _key(value: Any) -> Iterator[Any]:
    """The sizes, types and other values that a capture depends on."""
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
