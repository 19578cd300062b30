"""Encoding of images by CUDA graphs for 16, 8, 4, 2 and 1 images, each captured on first use.

Axes: I images, h and w height and width.
"""

from __future__ import annotations

import weakref
from functools import partial

import torch
from torch import Tensor

from ..model import MMInterleavedModel
from ..model.static import Pool, capture
from ..model.visual_tokenizer import VisualFeatures
from ..model.weights import state_of, why_not_captured

LARGEST_GRAPH = 16  # most images encoded together, a power of two
MOST_SPARE = 2  # most unused places of a graph: running a second graph would take longer


class GraphedImageEncoder:
    """The visual tokenizer for a fixed number of images. Its reference implementation is the model's `encode_images`.

    Args:
        model: the model, of which only a weak reference is kept.
        places: number of images that are encoded at a time; unused places keep earlier images.
        like: images [I, 3, h, w] of the shape and type of later calls.
        captured: whether it is captured in a CUDA graph; None: if the device is a CUDA device.
    """

    def __init__(self, model: MMInterleavedModel, places: int, like: Tensor, captured: bool | None = None) -> None:
        self._model = weakref.ref(model)
        self.pixels = torch.zeros(places, *like.shape[1:], dtype=like.dtype, device=like.device)
        self.features: VisualFeatures | None = None
        self.replay = None
        if like.device.type == "cuda" if captured is None else captured:
            self.replay = capture(self._step, like.device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> VisualFeatures:
        """The features of `pixels` [I, 3, h, w], where I is at most the number of places."""
        count = len(pixels)
        self.pixels[:count] = pixels
        (self.replay or self._step)()
        found = self.features
        assert found is not None  # the step has set them
        assert found.last_hidden_state is not None
        return VisualFeatures(
            found.tokens[:count].clone(), [m[:count].clone() for m in found.pyramid],
            found.last_hidden_state[:count].clone(),
        )  # fmt: skip

    def _step(self) -> None:
        model = self._model()
        assert model is not None  # the pool drops graphs of a model that was freed
        self.features = model.encode_images(self.pixels)


def _places(count: int) -> int:
    """The size of the graph that encodes the first of `count` images."""
    enough = 1 << (count - 1).bit_length()
    few_spare = enough - count <= min(MOST_SPARE, enough // 4)
    return min(enough if few_spare else enough // 2, LARGEST_GRAPH)


@torch.no_grad()
def encode_images(model: MMInterleavedModel, pixel_values: Tensor, graphs: bool) -> VisualFeatures:
    """The features of `pixel_values` [I, 3, h, w].

    Args:
        model: the model.
        pixel_values: [I, 3, h, w].
        graphs: whether to replay captured graphs, if the visual tokenizer can be captured.
    """
    if not graphs or why_not_captured(model.visual_tokenizer) is not None:
        return model.encode_images(pixel_values)
    return encode_by_graphs(model, pixel_values)


@torch.no_grad()
def encode_by_graphs(model: MMInterleavedModel, pixel_values: Tensor) -> VisualFeatures:
    """The features of `pixel_values` [I, 3, h, w], by graphs for some of them at a time."""
    left = pixel_values.to(model.compute_device)
    state, found = state_of(model.visual_tokenizer), []
    while len(left):
        places = _places(len(left))
        key = (places, left.shape[1:], left.dtype)
        with _pool.borrow(model, key, state, partial(GraphedImageEncoder, model, places, left)) as encoder:
            found.append(encoder(left[:places]))
        left = left[places:]
    pyramids = zip(*(f.pyramid for f in found), strict=True)
    return VisualFeatures(
        torch.cat([f.tokens for f in found]),
        [torch.cat(maps) for maps in pyramids],
        torch.cat([f.last_hidden_state for f in found]),
    )


_pool: Pool[GraphedImageEncoder] = Pool(LARGEST_GRAPH.bit_length())
