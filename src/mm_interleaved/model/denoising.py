"""A call of the UNet over fixed tensors, captured once in a CUDA graph and replayed for every step.

Everything that no step changes is computed once for each image: the values of the earlier images for every
synchronizer, the keys and values of the conditions, and the derived weights. Without a capture the same call runs
directly, so that a CPU tests everything but the capture. The reference implementation is a call of the UNet.

Axes: B batch of images that are generated, C latent channels, L tokens.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from .static import Pool, capture
from .unet import EarlierImages, MMFSUNet, TextKV
from .weights import state_of

LAYOUT = torch.channels_last  # memory format of convolutions on a CUDA device
KEPT = 4  # graphs kept for a UNet: with and without earlier images, with and without guidance


class GraphedUNet:
    """The UNet for latents, conditions and earlier images of one shape.

    Args:
        unet: the UNet, of which only a weak reference is kept. On a CUDA device its convolutions become channels last.
        latents: [B, C, side, side] of the shape and type of later calls.
        timestep: a scalar or [B], of the shape and type of later calls.
        conditions: [B, L, cross_attention_dim].
        earlier: earlier images with values.
        captured: whether to capture the step in a CUDA graph; None: if the device is a CUDA device.
        compiled: whether to compile the UNet first, which takes minutes; the compiled UNet keeps `unet` alive.
    """

    def __init__(
        self,
        unet: MMFSUNet,
        latents: Tensor,
        timestep: Tensor,
        conditions: Tensor,
        earlier: EarlierImages,
        captured: bool | None = None,
        compiled: bool = False,
    ) -> None:
        self._unet = weakref.ref(unet)
        self._compiled = torch.compile(unet, dynamic=False) if compiled else None
        device = conditions.device
        self.latents = latents.clone()
        if device.type == "cuda":
            self.latents = self.latents.contiguous(memory_format=LAYOUT)
        self.timestep = torch.zeros(timestep.shape, dtype=timestep.dtype, device=device)
        self.conditions = conditions.clone()
        with torch.no_grad():
            self.text = {k: (key.clone(), value.clone()) for k, (key, value) in unet.prepare_text(conditions).items()}
        self.derived = unet.derive()
        self.earlier = _clone(earlier)
        self.prediction: Tensor | None = None
        self.replay = None
        if device.type == "cuda" if captured is None else captured:
            self.replay = capture(self._step, device)

    @torch.no_grad()
    def load(self, conditions: Tensor, earlier: EarlierImages) -> None:
        """Copy new conditions and earlier images of the same shapes, and rebuild the derived weights."""
        unet = self._unet()
        assert unet is not None  # the pool drops graphs of a UNet that was freed
        unet.derive(self.derived)
        self.conditions.copy_(conditions)
        ours, theirs = _tensors(self.text, self.earlier), _tensors(unet.prepare_text(conditions), earlier)
        for mine, given in zip(ours, theirs, strict=True):
            mine.copy_(given)

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The UNet's prediction for `latents` at `timestep`."""
        self.latents.copy_(latents)
        self.timestep.copy_(timestep, non_blocking=True)
        (self.replay or self._step)()
        assert self.prediction is not None  # the step has set it
        return self.prediction.clone()

    def _step(self) -> None:
        unet = self._unet() if self._compiled is None else self._compiled
        assert unet is not None
        prediction = unet(self.latents, self.timestep, self.conditions, self.earlier, self.text, self.derived)
        if self.prediction is None:
            self.prediction = torch.empty_like(prediction)
        self.prediction.copy_(prediction)


def _tensors(text: TextKV, earlier: EarlierImages) -> list[Tensor]:
    """The tensors that change from image to image, in a fixed order."""
    assert earlier.values is not None
    found = [x for pair in text.values() for x in pair] + [earlier.visible.images, *earlier.values]
    return found if earlier.visible.routes is None else [*found, earlier.visible.routes]


def _clone(earlier: EarlierImages) -> EarlierImages:
    """A copy of the images, without the maps that their values were projected from."""
    given = vars(earlier.visible)
    visible = replace(earlier.visible, **{k: None if v is None else v.clone() for k, v in given.items()})
    nothing = earlier.features[:0]
    assert earlier.values is not None
    return replace(
        earlier, features=nothing, normed=nothing, visible=visible, values=[v.clone() for v in earlier.values]
    )


_pool: Pool[GraphedUNet] = Pool(KEPT)


def borrow(
    unet: MMFSUNet,
    latents: Tensor,
    timestep: Tensor,
    conditions: Tensor,
    earlier: EarlierImages,
    captured: bool | None = None,
    compiled: bool = False,
) -> AbstractContextManager[GraphedUNet]:
    """Lease a `GraphedUNet` for these shapes exclusively. Call `load` before the first step."""
    if conditions.device.type == "cuda" and captured is not False:
        lay_out(unet, LAYOUT)
    kinds = [(x.shape, x.dtype) for x in (latents, timestep, conditions, *_tensors({}, earlier))]
    key = (tuple(kinds), tuple(earlier.shapes), captured, compiled)

    def make() -> GraphedUNet:
        return GraphedUNet(unet, latents, timestep, conditions, earlier, captured, compiled)

    return _pool.borrow(unet, key, state_of(unet), make)


def lay_out(unet: MMFSUNet, layout: torch.memory_format) -> None:
    """Change the memory format of convolution weights; their values stay the same."""
    for parameter in unet.parameters():
        if parameter.dim() == 4 and not parameter.is_contiguous(memory_format=layout):
            parameter.data = parameter.data.contiguous(memory_format=layout)
