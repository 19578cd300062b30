"""Documents as token streams, and packing of many documents into rows (docs/model.md, "Rows, documents and packing").

A pair that is longer than a row is shortened before packing, by `data/stream.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..document import Image

Cut = Literal["image", "document"]
Packing = Literal["stream", "samples", "single"]


@dataclass
class TokenStream:
    """Tokens with their images.

    Attributes:
        ids: int64 [L]; each image is one begin-of-image id and `num_image_tokens` image ids.
        learned: bool [L], whether training learns the token.
        images: the images in the order of their begin-of-image ids.
        starts: bool [L], whether a sample starts at the token; all False if it is not given.
    """

    ids: np.ndarray
    learned: np.ndarray
    images: list[Image]
    starts: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def __post_init__(self) -> None:
        if len(self.starts) < len(self.ids):
            self.starts = np.zeros(len(self.ids), bool)

    @classmethod
    def empty(cls) -> TokenStream:
        """A stream without tokens."""
        return cls(np.zeros(0, np.int64), np.zeros(0, bool), [])

    @property
    def samples(self) -> np.ndarray:
        """int64 [L], the number of each token's sample; tokens before the first start are a sample, too."""
        numbers = self.starts.cumsum()
        return numbers - numbers[:1]

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: TokenStream) -> TokenStream:
        pairs = ((self.ids, other.ids), (self.learned, other.learned), (self.starts, other.starts))
        ids, learned, starts = (np.concatenate(p) for p in pairs)
        return TokenStream(ids, learned, self.images + other.images, starts)

    def select(self, tokens: np.ndarray | slice, images: list[Image]) -> TokenStream:
        """Some of the tokens, with the images that they hold."""
        return TokenStream(self.ids[tokens], self.learned[tokens], images, self.starts[tokens])

    def split(self, at: int, soi_token_id: int) -> tuple[TokenStream, TokenStream]:
        """The part before position `at` and the rest; an image belongs to the part of its begin-of-image id."""
        count = int((self.ids[:at] == soi_token_id).sum())
        return self.select(slice(at), self.images[:count]), self.select(slice(at, None), self.images[count:])


def pack(
    documents: Iterable[TokenStream],
    *,
    length: int,
    num_image_tokens: int,
    bos_token_id: int,
    soi_token_id: int,
    max_images: int | None = None,
    cut: Cut = "image",
    keep_last: bool = True,
) -> Iterator[TokenStream]:
    """Concatenate documents and cut the stream into rows of at most `length` tokens. No image is cut.

    A row may start and end inside a document. Rows without an image are dropped.

    Args:
        documents: token streams, each starting with `<s>`.
        length: tokens of a full row.
        num_image_tokens: image ids per image.
        bos_token_id: id of `<s>`.
        soi_token_id: id of the begin-of-image token.
        max_images: most images in a row; None: no limit.
        cut: where a row ends whose last image does not fit: before that image ("image"), or before the document of
            that image ("document"; if that document fills the whole row, before the image).
        keep_last: whether the rest at the end becomes a row, however short it is.
    """
    rules = PackingRules(length, num_image_tokens, bos_token_id, soi_token_id, max_images, cut)
    rows = rules.rows(documents, keep_last)
    yield from (row for row in rows if row.images)


@dataclass(frozen=True)
class PackingRules:
    """The rules that decide where rows end; for the other fields see `pack`.

    Attributes:
        packing: rows end anywhere between images (`stream`), only between samples (`samples`), or after each sample
            (`single`). For the last two each sample must fit into a row, see `excess`.
    """

    length: int
    num_image_tokens: int
    bos_token_id: int
    soi_token_id: int
    max_images: int | None = None
    cut: Cut = "image"
    packing: Packing = "stream"

    def rows(self, documents: Iterable[TokenStream], keep_last: bool = True) -> Iterator[TokenStream]:
        """The rows of `documents`; `keep_last`: whether the rest at the end becomes a row."""
        buffer = TokenStream.empty()
        for document in documents:
            buffer = buffer + document
            while (taken := self.take(buffer)) is not None:
                row, buffer = taken
                yield row
        while keep_last and (taken := self.take(buffer, last=True)) is not None:
            row, buffer = taken
            yield row

    def excess(self, sample: TokenStream) -> str | None:
        """Why a sample does not fit into a row; None: it fits."""
        if len(sample) > self.length:
            return f"{len(sample)} tokens, but rows have {self.length}"
        if self.max_images is not None and len(sample.images) > self.max_images:
            return f"{len(sample.images)} images, but rows have at most {self.max_images}"
        return None

    def take(self, buffer: TokenStream, last: bool = False) -> tuple[TokenStream, TokenStream] | None:
        """The next row, which is never empty, and the rest of `buffer`; None: the row needs more documents.

        Args:
            buffer: documents without a row so far.
            last: whether no more documents follow.

        Raises:
            ValueError: an image does not fit into a row.
        """
        if self.packing == "stream":
            return self._cut(buffer) if len(buffer) >= (1 if last else self.length) else None
        ends = np.append(np.flatnonzero(buffer.starts)[1:], len(buffer))
        if not len(buffer):
            return None
        count = 1 if self.packing == "single" else self._fitting(buffer, ends)
        if count == len(ends) and self.packing == "samples" and not last and len(buffer) < self.length:
            return None  # another sample may fit
        return buffer.split(int(ends[count - 1]), self.soi_token_id)

    def _fitting(self, buffer: TokenStream, ends: np.ndarray) -> int:
        """The number of samples of `buffer` that fit into one row; `ends` are their ends."""
        fits = ends <= self.length
        if self.max_images is not None:
            fits &= (buffer.ids == self.soi_token_id).cumsum()[ends - 1] <= self.max_images
        return int(fits.sum())

    def _cut(self, buffer: TokenStream) -> tuple[TokenStream, TokenStream]:
        """The next row of a stream that is cut between images, and the rest."""
        end = min(self.length, len(buffer))
        soi = np.flatnonzero(buffer.ids[:end] == self.soi_token_id)
        complete = soi[soi + self.num_image_tokens < end]
        limit = self.max_images
        if limit is not None and len(complete) > limit:
            end = self._after_limit(buffer.ids, soi, limit)
        elif len(complete) < len(soi):
            end = self._before_cut_image(buffer.ids, int(soi[-1]))
        return buffer.split(end, self.soi_token_id)

    def _after_limit(self, ids: np.ndarray, soi: np.ndarray, limit: int) -> int:
        if self.cut == "image":
            return int(soi[limit - 1]) + self.num_image_tokens + 1
        surplus = int(soi[limit])
        start = self._last_bos(ids, surplus)
        return start if start > soi[limit - 1] else surplus

    def _before_cut_image(self, ids: np.ndarray, image: int) -> int:
        if image == 0:
            raise ValueError(f"an image of {self.num_image_tokens + 1} tokens does not fit into a row of {self.length}")
        start = self._last_bos(ids, image) if self.cut == "document" else 0
        return start if start > 0 else image

    def _last_bos(self, ids: np.ndarray, before: int) -> int:
        found = np.flatnonzero(ids[:before] == self.bos_token_id)
        return int(found[-1]) if len(found) else 0
