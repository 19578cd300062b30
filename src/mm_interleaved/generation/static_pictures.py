"""Pictures for a context: encoded by recordings, and read as a block of columns over memory that never moves."""

from __future__ import annotations

import weakref
from functools import partial

import torch
from torch import Tensor

from ..model import MMInterleavedModel
from ..model.static import Pool, capture
from ..model.visual_tokenizer import VisualFeatures
from ..model.weights import state_of
from .context import Context, Eyes
from .settings import CacheImplementation
from .static import Room, borrow, uses_static

MOST_SEEN = 16  # pictures that are encoded together, a power of two
MOST_SPARE = 2  # places of a recording that may stay empty: one more recording would take longer


class StaticEyes:
    """The visual tokenizer for at most so many pictures; its twin is `MMInterleavedModel.encode_images`.

    Args:
        model: whose it is.
        places: pictures that it encodes at a time, of which some may be whatever was there before.
        like: pictures [pictures, 3, side, side] as they will be.
        captured: whether it is recorded; None: on a CUDA device.
    """

    def __init__(self, model: MMInterleavedModel, places: int, like: Tensor, captured: bool | None = None) -> None:
        self._model = weakref.ref(model)
        self.pixels = like.new_zeros(places, *like.shape[1:])
        self.features: VisualFeatures | None = None
        self.replay = None
        if like.device.type == "cuda" if captured is None else captured:
            self.replay = capture(self._step, like.device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> VisualFeatures:
        """Features of `pixels` [pictures, 3, side, side], at most as many as there are places."""
        count = len(pixels)
        self.pixels[:count] = pixels
        (self.replay or self._step)()
        seen = self.features
        return VisualFeatures(
            seen.tokens[:count].clone(), [m[:count].clone() for m in seen.pyramid],
            seen.last_hidden_state[:count].clone(),
        )  # fmt: skip

    def _step(self) -> None:
        self.features = self._model().encode_images(self.pixels)


def _places(count: int) -> int:
    """In a recording for how many of `count` pictures to begin."""
    enough = 1 << (count - 1).bit_length()
    few_spare = enough - count <= min(MOST_SPARE, enough // 4)
    return min(enough if few_spare else enough // 2, MOST_SEEN)


@torch.no_grad()
def see(model: MMInterleavedModel, pixel_values: Tensor) -> VisualFeatures:
    """`MMInterleavedModel.encode_images` by recordings of 16, 8, 4, 2 and 1 pictures, each made when first needed."""
    left = pixel_values.to(model.compute_device)
    weights, found = state_of(model.visual_tokenizer), []
    while len(left):
        places = _places(len(left))
        key = (places, left.shape[1:], left.dtype)
        with _eyes.borrow(model, key, weights, partial(StaticEyes, model, places, left)) as eyes:
            found.append(eyes(left[:places]))
        left = left[places:]
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
