"""Documents as token streams, and packing of many documents into rows (docs/model.md, "Rows, documents and packing").

A pair that is longer than a row is shortened before packing, by `data/stream.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..document import Image

Cut = Literal["image", "document"]


@dataclass
class TokenStream:
    """Tokens with their images.

    Attributes:
        ids: int64 [L]; each image is one begin-of-image id and `num_image_tokens` image ids.
        learned: bool [L], whether training learns the token.
        images: the images in the order of their begin-of-image ids.
    """

    ids: np.ndarray
    learned: np.ndarray
    images: list[Image]

    @classmethod
    def empty(cls) -> TokenStream:
        """A stream without tokens."""
        return cls(np.zeros(0, np.int64), np.zeros(0, bool), [])

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: TokenStream) -> TokenStream:
        ids, learned = (np.concatenate(p) for p in ((self.ids, other.ids), (self.learned, other.learned)))
        return TokenStream(ids, learned, self.images + other.images)

    def split(self, at: int, soi_token_id: int) -> tuple[TokenStream, TokenStream]:
        """The part before position `at` and the rest; an image belongs to the part of its begin-of-image id."""
        count = int((self.ids[:at] == soi_token_id).sum())
        return (
            TokenStream(self.ids[:at], self.learned[:at], self.images[:count]),
            TokenStream(self.ids[at:], self.learned[at:], self.images[count:]),
        )


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
    buffer = TokenStream.empty()
    for document in documents:
        buffer = buffer + document
        while len(buffer) >= length:
            row, buffer = rules.take(buffer)
            if row.images:
                yield row
    while keep_last and len(buffer):
        row, buffer = rules.take(buffer)
        if row.images:
            yield row


@dataclass(frozen=True)
class PackingRules:
    """The rules that decide where rows end; for the fields see `pack`."""

    length: int
    num_image_tokens: int
    bos_token_id: int
    soi_token_id: int
    max_images: int | None
    cut: Cut

    def take(self, buffer: TokenStream) -> tuple[TokenStream, TokenStream]:
        """The next row and the rest of `buffer`. The row is never empty."""
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
