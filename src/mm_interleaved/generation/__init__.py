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
from .rules import WrittenText
from .settings import IMAGE_PRESETS, TEXT_PRESETS, GenerationSettings, ImagePreset, ImageSettings, TextSettings

__all__ = [
    "IMAGE_PRESETS",
    "TEXT_PRESETS",
    "Context",
    "DocumentFinished",
    "Event",
    "GenerationSettings",
    "ImagePreset",
    "ImageProgress",
    "ImageSettings",
    "InterleavedGenerator",
    "MMInterleaved",
    "SegmentFinished",
    "TextDelta",
    "TextSettings",
    "WrittenText",
]
