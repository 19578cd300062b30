"""Generation: text, images, option scores, and documents in which both alternate."""

from transformers import AutoModel, AutoModelForImageTextToText

from ..model import MMInterleavedConfig
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
from .state import GenerationState

AutoModel.register(MMInterleavedConfig, MMInterleaved, exist_ok=True)
AutoModelForImageTextToText.register(MMInterleavedConfig, MMInterleaved, exist_ok=True)

__all__ = [
    "IMAGE_PRESETS",
    "TEXT_PRESETS",
    "DocumentFinished",
    "Event",
    "GenerationSettings",
    "GenerationState",
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
