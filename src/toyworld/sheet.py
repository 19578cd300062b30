"""A contact sheet: documents with their images and texts, to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import PIL.Image

from mm_interleaved.data.sheet import Piece, draw_panels
from mm_interleaved.document import Document, Text

MAX_HEIGHT = 4000  # of a document, in pixels


def contact_sheet(documents: Sequence[Document], cell: int = 192) -> PIL.Image.Image:
    """Return documents with images in memory, one under another, in reading order; images have sides of `cell`."""
    return draw_panels(((document.name, _pieces(document, cell)) for document in documents), MAX_HEIGHT)


def _pieces(document: Document, cell: int) -> Iterator[Piece]:
    for segment in document.segments:
        if isinstance(segment, Text):
            yield from (Piece(word, segment.supervise) for word in (segment.text or "").split())
        else:
            assert isinstance(segment.source, PIL.Image.Image), "sheets are made of documents in memory"
            yield Piece(segment.source.resize((cell, cell), PIL.Image.Resampling.BICUBIC), segment.supervise)
