"""What generation yields while texts and images are generated."""

from __future__ import annotations

from dataclasses import dataclass

import PIL.Image

from ..document import Document, Segment


@dataclass
class TextDelta:
    """New text of a document's current slot; only without beam search (`num_beams=1`).

    The texts of beams are known when they end: then `SegmentFinished` has the whole text.
    """

    document: int
    text: str


@dataclass
class ImageProgress:
    """One denoising step of a document's current image; `preview` only if the settings ask for it."""

    document: int
    candidate: int
    step: int
    total: int
    preview: PIL.Image.Image | None = None


@dataclass
class SegmentFinished:
    """A text or an image is finished.

    Attributes:
        document: number of the document in the batch.
        segment: the segment from which the document continues. `segment.generated` has its turn and what the model
            generated: tokens and text, also if a forced text replaces them; all candidates of an image.
    """

    document: int
    segment: Segment


@dataclass
class DocumentFinished:
    """A document is finished.

    Attributes:
        document: number of the document in the batch.
        result: the document with its slots filled, and its continuation; see `Segment.generated`.
        reason: `slots` (all filled), `eos`, `turns`, `segments`, `tokens`, `images` or `context` (the context is full).
    """

    document: int
    result: Document
    reason: str


Event = TextDelta | ImageProgress | SegmentFinished | DocumentFinished
