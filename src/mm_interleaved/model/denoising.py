"""One call of the UNet over tensors that never move, recorded once and replayed for every denoising step.

What does not change from step to step is prepared once a picture: the values of the earlier pictures for every
synchronizer, the text's keys and values, the maps folded for inference. Its twin is a call of the UNet itself.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .static import Pool, addresses, capture
from .unet import EarlierImages, KeptText, MMFSUNet

CacheImplementation = Literal["auto", "static", "dynamic"]
LAYOUT = torch.channels_last  # of convolutions on a CUDA device
KEPT = 4  # recordings a UNet keeps: with and without earlier pictures, with and without guidance


def why_not_static(unet: MMFSUNet) -> str | None:
    """Why a step of `unet` cannot be recorded; None: it can."""
    devices = {p.device for p in unet.parameters()}
    if len(devices) > 1 or any(d.type == "meta" for d in devices):
        return "its weights are offloaded, or spread over several devices"
    return None


class StaticUNet:
    """The UNet for drawings, conditions and earlier pictures of one shape.

    Args:
        unet: of which only a weak reference is kept. On a CUDA device its convolutions are laid out channels last.
        latents: [drawings, channels, side, side] of the shape and type of all that will come.
        timestep: a scalar of the type of all that will come.
        conditions: [drawings, tokens, cross_attention_dim].
        earlier: prepared.
        captured: whether to record the step in a CUDA graph; None: on a CUDA device.
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
        self.earlier = _clone(earlier)
        self.prediction: Tensor | None = None
        self.replay = None
        if device.type == "cuda" if captured is None else captured:
            self.replay = capture(self._step, device)

    @torch.no_grad()
    def load(self, conditions: Tensor, earlier: EarlierImages) -> None:
        """Take new conditions and earlier pictures, of the same shapes."""
        self.conditions.copy_(conditions)
        ours, theirs = _tensors(self.text, self.earlier), _tensors(self._unet().prepare_text(conditions), earlier)
        for mine, given in zip(ours, theirs, strict=True):
            mine.copy_(given)

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The UNet's prediction for `latents` at `timestep`."""
        self.latents.copy_(latents)
        self.timestep.fill_(timestep.item())
        (self.replay or self._step)()
        return self.prediction.clone()

    def _step(self) -> None:
        unet = self._unet() if self._compiled is None else self._compiled
        prediction = unet(self.latents, self.timestep, self.conditions, self.earlier, self.text)
        if self.prediction is None:
            self.prediction = torch.empty_like(prediction)
        self.prediction.copy_(prediction)


def _tensors(text: KeptText, earlier: EarlierImages) -> list[Tensor]:
    """Everything that changes from picture to picture, in a fixed order."""
    found = [x for pair in text.values() for x in pair] + [earlier.visible.images]
    if earlier.visible.routes is not None:
        found.append(earlier.visible.routes)
    for p in earlier.prepared:
        found += [p.values, p.folded.weight, p.folded.bias, p.folded.table, p.output.weight, p.output.bias]
    return found


def _clone(earlier: EarlierImages) -> EarlierImages:
    """The same prepared pictures in memory of their own, without the maps that they were prepared from."""
    given = vars(earlier.visible)
    visible = replace(earlier.visible, **{k: None if v is None else v.clone() for k, v in given.items()})
    prepared = [
        replace(
            p,
            values=p.values.clone(),
            folded=replace(p.folded, **{k: v.clone() for k, v in vars(p.folded).items()}),
            output=replace(p.output, **{k: v.clone() for k, v in vars(p.output).items()}),
        )
        for p in earlier.prepared
    ]
    nothing = earlier.features[:0]
    return replace(earlier, features=nothing, normed=nothing, visible=visible, prepared=prepared)


_pool: Pool[StaticUNet] = Pool(KEPT)


def borrow(
    unet: MMFSUNet,
    latents: Tensor,
    timestep: Tensor,
    conditions: Tensor,
    earlier: EarlierImages,
    captured: bool | None = None,
    compiled: bool = False,
) -> AbstractContextManager[StaticUNet]:
    """A `StaticUNet` for these shapes, loaded, for nobody else until it is given back."""
    if conditions.device.type == "cuda" and captured is not False:
        lay_out(unet, LAYOUT)
    kinds = [(x.shape, x.dtype) for x in (latents, timestep, conditions, *_tensors({}, earlier))]
    key = (tuple(kinds), tuple(earlier.shapes), captured, compiled)

    def make() -> StaticUNet:
        return StaticUNet(unet, latents, timestep, conditions, earlier, captured, compiled)

    return _pool.borrow(unet, key, addresses(unet), make)


def lay_out(unet: MMFSUNet, layout: torch.memory_format) -> None:
    """Lay the weights of convolutions out in memory, as the GPU's matrix units want them; their values stay."""
    for parameter in unet.parameters():
        if parameter.dim() == 4 and not parameter.is_contiguous(memory_format=layout):
            parameter.data = parameter.data.contiguous(memory_format=layout)
