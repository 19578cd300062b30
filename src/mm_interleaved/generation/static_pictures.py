"""Pictures for a context: encoded by recordings, and read as a block of columns over memory that never moves."""

from __future__ import annotations

import weakref
from functools import partial

import torch
from torch import Tensor

from ..model import MMInterleavedModel
from ..model.static import Pool, addresses, capture
from ..model.visual_tokenizer import VisualFeatures
from .context import Context, Eyes
from .settings import CacheImplementation
from .static import Room, borrow, uses_static

MOST_SEEN = 8  # pictures that are encoded together, a power of two


class StaticEyes:
    """The visual tokenizer for pictures of one shape; its twin is `MMInterleavedModel.encode_images`."""

    def __init__(self, model: MMInterleavedModel, pixels: Tensor, captured: bool | None = None) -> None:
        self._model = weakref.ref(model)
        self.pixels = pixels.clone()
        self.features: VisualFeatures | None = None
        self.replay = None
        if pixels.device.type == "cuda" if captured is None else captured:
            self.replay = capture(self._step, pixels.device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> VisualFeatures:
        """Features of `pixels` [pictures, 3, side, side]."""
        self.pixels.copy_(pixels)
        (self.replay or self._step)()
        seen = self.features
        return VisualFeatures(seen.tokens.clone(), [m.clone() for m in seen.pyramid], seen.last_hidden_state.clone())

    def _step(self) -> None:
        self.features = self._model().encode_images(self.pixels)


@torch.no_grad()
def see(model: MMInterleavedModel, pixel_values: Tensor) -> VisualFeatures:
    """`MMInterleavedModel.encode_images` through recordings of 8, 4, 2 and 1 pictures, each made when first needed."""
    pixels = pixel_values.to(model.compute_device)
    weights, found, place = addresses(model.visual_tokenizer), [], 0
    while place < len(pixels):
        count = min(1 << (len(pixels) - place).bit_length() - 1, MOST_SEEN)
        part = pixels[place : place + count]
        with _eyes.borrow(model, (part.shape, part.dtype), weights, partial(StaticEyes, model, part)) as eyes:
            found.append(eyes(part))
        place += count
    pyramids = zip(*(f.pyramid for f in found), strict=True)
    return VisualFeatures(
        torch.cat([f.tokens for f in found]),
        [torch.cat(maps) for maps in pyramids],
        torch.cat([f.last_hidden_state for f in found]),
    )


def eyes_of(model: MMInterleavedModel, implementation: CacheImplementation) -> Eyes | None:
    """What a `Context` encodes pictures with; None: the model itself."""
    return partial(see, model) if uses_static(model, implementation) else None


def read_images(context: Context, rows: list[int], pixel_values: Tensor) -> None:
    """Let `context` read the pictures that `rows` have been waiting for; the twin of `Context.append_images`."""
    context.flush()
    model = context.model
    features = see(model, pixel_values)

    def read(embeds: Tensor, mask: Tensor, images: Tensor) -> None:
        count = embeds.shape[1]
        with borrow(model, Room.needed(context, 1, count)) as decoder:
            decoder.prepare_block(count)
            decoder.load(context)
            decoder.read_block(embeds, mask[:, 0] == 1)
            decoder.store(context, count)

    context.append_features(rows, features, read)


_eyes: Pool[StaticEyes] = Pool(MOST_SEEN.bit_length())
