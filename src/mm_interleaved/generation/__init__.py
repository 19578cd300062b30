"""Generation: text, pictures, option scores, and documents in which both alternate."""

from .context import Context
from .interleaved import (
    DocumentFinished,
    Event,
    ImageProgress,
    InterleavedGenerator,
    SegmentFinished,
    TextDelta,
)
from .mm_interleaved import MMInterleaved
from .settings import TEXT_PRESETS, GenerationSettings, ImageSettings, TextSettings
from .text import WrittenText

__all__ = [
    "TEXT_PRESETS",
    "Context",
    "DocumentFinished",
    "Event",
    "GenerationSettings",
    "ImageProgress",
    "ImageSettings",
    "InterleavedGenerator",
    "MMInterleaved",
    "SegmentFinished",
    "TextDelta",
    "TextSettings",
    "WrittenText",
]
