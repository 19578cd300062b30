"""One call of the UNet over tensors that never move, captured once in a CUDA graph and replayed for every step.

What does not change from step to step is prepared once for each image: the values of the earlier images for every
synchronizer, the text's keys and values, the derived weights. Where nothing is captured, the same call runs directly,
so a CPU tests all but the capture. The reference implementation is a call of the UNet itself.

Axes: B batch of images that are generated, C latent channels, L tokens.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .static import Pool, capture
from .unet import EarlierImages, MMFSUNet, TextKV
from .weights import state_of

CacheImplementation = Literal["auto", "static", "dynamic"]
LAYOUT = torch.channels_last  # of convolutions on a CUDA device
KEPT = 4  # graphs a UNet keeps: with and without earlier images, with and without guidance


class GraphedUNet:
    """The UNet for latents, conditions and earlier images of one shape.

    Args:
        unet: of which only a weak reference is kept. On a CUDA device its convolutions are laid out channels last.
        latents: [B, C, side, side] of the shape and type of all that will come.
        timestep: a scalar of the type of all that will come.
        conditions: [B, L, cross_attention_dim].
        earlier: with values.
        captured: whether to capture the step in a CUDA graph; None: on a CUDA device.
        compiled: whether to compile the UNet first, which takes minutes; what is compiled holds on to `unet`.
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
        self.timestep = torch.zeros((), dtype=timestep.dtype, device=device)
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
        """Take new conditions and earlier images, of the same shapes, and the weights of this moment."""
        unet = self._unet()
        assert unet is not None  # a pool forgets what it made for a UNet that is gone
        unet.derive(self.derived)
        self.conditions.copy_(conditions)
        ours, theirs = _tensors(self.text, self.earlier), _tensors(unet.prepare_text(conditions), earlier)
        for mine, given in zip(ours, theirs, strict=True):
            mine.copy_(given)

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The UNet's prediction for `latents` at `timestep`."""
        self.latents.copy_(latents)
        self.timestep.fill_(timestep.item())
        (self.replay or self._step)()
        assert self.prediction is not None  # the step has made it
        return self.prediction.clone()

    def _step(self) -> None:
        unet = self._unet() if self._compiled is None else self._compiled
        assert unet is not None
        prediction = unet(self.latents, self.timestep, self.conditions, self.earlier, self.text, self.derived)
        if self.prediction is None:
            self.prediction = torch.empty_like(prediction)
        self.prediction.copy_(prediction)


def _tensors(text: TextKV, earlier: EarlierImages) -> list[Tensor]:
    """Everything that changes from image to image, in a fixed order."""
    assert earlier.values is not None
    found = [x for pair in text.values() for x in pair] + [earlier.visible.images, *earlier.values]
    return found if earlier.visible.routes is None else [*found, earlier.visible.routes]


def _clone(earlier: EarlierImages) -> EarlierImages:
    """The same images in memory of their own, without the maps that their values were projected from."""
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
    """A `GraphedUNet` for these shapes, for nobody else until it is given back. `load` it before the first call."""
    if conditions.device.type == "cuda" and captured is not False:
        lay_out(unet, LAYOUT)
    kinds = [(x.shape, x.dtype) for x in (latents, timestep, conditions, *_tensors({}, earlier))]
    key = (tuple(kinds), tuple(earlier.shapes), captured, compiled)

    def make() -> GraphedUNet:
        return GraphedUNet(unet, latents, timestep, conditions, earlier, captured, compiled)

    return _pool.borrow(unet, key, state_of(unet), make)


def lay_out(unet: MMFSUNet, layout: torch.memory_format) -> None:
    """Lay the weights of convolutions out in memory, as the GPU's matrix units want them; their values stay."""
    for parameter in unet.parameters():
        if parameter.dim() == 4 and not parameter.is_contiguous(memory_format=layout):
            parameter.data = parameter.data.contiguous(memory_format=layout)
