"""What an inspection collects, as arrays.

Axes: T tokens, Y decoder layers, K denoising steps, Q collected cells of a map of the UNet (row by row), N heads, R
earlier images (the most recent one first), V levels of an image's pyramid, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..document import Document


@dataclass
class Points:
    """Sampling points of MMFS; all arrays are float32 and begin with the same axes.

    Attributes:
        locations: [..., N, R, P, 2], (x, y) in shares of the earlier image's sides, from its upper left corner. They
            may lie outside of the image, where features count as 0. All levels share them.
        weights: [..., N, R, V, P]. The weights of a head and `ignored` add up to 1.
        ignored: [..., N] the share of the ignore slot.
    """

    locations: np.ndarray
    weights: np.ndarray
    ignored: np.ndarray

    @property
    def nbytes(self) -> int:
        """The memory of the arrays."""
        return self.locations.nbytes + self.weights.nbytes + self.ignored.nbytes

    def __getitem__(self, index: Any) -> Points:
        """The points at an index of the first axes."""
        return Points(self.locations[index], self.weights[index], self.ignored[index])

    def of_images(self, count: int) -> Points:
        """The points in the first `count` images: slots behind them are padding, for other rows of the batch."""
        return Points(self.locations[..., :count, :, :], self.weights[..., :count, :, :], self.ignored)

    @classmethod
    def stack(cls, parts: Sequence[Points]) -> Points:
        """Points along a new first axis."""
        return cls(*(np.stack(same) for same in zip(*((p.locations, p.weights, p.ignored) for p in parts),
                                                    strict=True)))  # fmt: skip

    @classmethod
    def nothing(cls, shape: Sequence[int], heads: int, levels: int, points: int) -> Points:
        """The points of queries that see no image: all of the weight is ignored."""
        return cls(np.zeros((*shape, heads, 0, points, 2), np.float32),
                   np.zeros((*shape, heads, 0, levels, points), np.float32),
                   np.ones((*shape, heads), np.float32))  # fmt: skip


@dataclass
class TextRecord:
    """Where the language model looked for each token of a generated text.

    The values of a token are those of the query whose logits the token was chosen from, one position before it. The
    reference point of every query is the centre of the image.

    Attributes:
        segment: index of the text in the document's segments.
        ids: [T] the tokens, with the end token.
        pieces: [T] what each token adds to the text.
        words: (begin, end) tokens of each word.
        images: [R] the earlier images by their number among the document's images.
        layers: [Y] numbers of the decoder layers.
        heads: [N] numbers of the heads.
        levels: [V] sides of the sampled maps.
        base: an offset of 1/base of the image's side is 1 in the units of the layer.
        points: with the first axes [T, Y].
    """

    segment: int
    ids: list[int]
    pieces: list[str]
    words: list[tuple[int, int]]
    images: list[int]
    layers: list[int]
    heads: list[int]
    levels: list[int]
    base: int
    points: Points

    @property
    def reference(self) -> np.ndarray:
        """[2] the reference point."""
        return np.full(2, 0.5, np.float32)

    @property
    def offsets(self) -> np.ndarray:
        """[T, Y, N, R, P, 2] locations relative to the reference point, in shares of the image's sides."""
        return self.points.locations - self.reference

    def word(self, index: int) -> str:
        """A word as text."""
        begin, end = self.words[index]
        return "".join(self.pieces[begin:end]).strip()

    @property
    def nbytes(self) -> int:
        """The memory of the arrays."""
        return self.points.nbytes


@dataclass
class MapRecord:
    """Where the cells of one map of the UNet looked.

    Attributes:
        place: number of the synchronizer.
        name: "skip" and its number, or "middle".
        side: cells of a side.
        rows: the rows, and columns, of the cells that were collected.
        base: as in `TextRecord`.
        points: with the first axes [K, Q], of the half of guidance that has the context.
    """

    place: int
    name: str
    side: int
    rows: list[int]
    base: int
    points: Points

    @property
    def reference(self) -> np.ndarray:
        """[Q, 2] the reference points: the centres of the cells."""
        centres = (np.array(self.rows, np.float32) + 0.5) / self.side
        return np.stack(np.broadcast_arrays(centres[None, :], centres[:, None]), axis=-1).reshape(-1, 2)

    @property
    def offsets(self) -> np.ndarray:
        """[K, Q, N, R, P, 2] locations relative to the reference points, in shares of the image's sides."""
        return self.points.locations - self.reference[:, None, None, None]


@dataclass
class ImageRecord:
    """Where the image decoder looked for each part of a generated image (of its first candidate).

    Attributes:
        segment: index of the image in the document's segments.
        image: its number among the document's images.
        images: [R] the earlier images by their number among the document's images.
        steps: [K] denoising steps, from 1.
        timesteps: [K] their diffusion times.
        total: number of denoising steps.
        heads: [N] numbers of the heads.
        levels: [V] sides of the sampled maps.
        maps: the maps of the UNet, in the order of its synchronizers.
    """

    segment: int
    image: int
    images: list[int]
    steps: list[int]
    timesteps: list[int]
    total: int
    heads: list[int]
    levels: list[int]
    maps: list[MapRecord]

    @property
    def nbytes(self) -> int:
        """The memory of the arrays."""
        return sum(one.points.nbytes for one in self.maps)


@dataclass
class Inspection:
    """A generated document, and where MMFS looked while it was generated.

    Attributes:
        document: the result.
        reason: why generation ended, see `DocumentFinished`.
        texts, images: for each generated text and image its record, in the order of the document.
        views: the document's images as the model reads them: square.
        run: the model and the settings, as JSON.
    """

    document: Document
    reason: str
    texts: list[TextRecord]
    images: list[ImageRecord]
    views: list[PIL.Image.Image]
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The memory of the arrays."""
        return sum(record.nbytes for record in (*self.texts, *self.images))

    def save(self, folder: str | Path) -> None:
        """Write arrays, document and images into a folder; `load_inspection` reads them."""
        from .files import save_inspection

        save_inspection(self, folder)

    def to_html(self) -> str:
        """One interactive page, which needs no other file.

        Raises:
            InputError: the page would be too large.
        """
        from .page import to_html

        return to_html(self)

    def _repr_html_(self) -> str:
        from .page import to_frame

        return to_frame(self)
