"""Generation: text, images, option scores, and documents in which both alternate."""

from transformers import AutoModel, AutoModelForImageTextToText

from ..model import MMInterleavedConfig
from .continuous import ContinuousGenerator
from .events import DocumentFinished, Event, ImageProgress, SegmentFinished, TextDelta
from .interleaved import InterleavedGenerator
from .mm_interleaved import MMInterleaved
from .rules import WrittenText
from .settings import IMAGE_PRESETS, TEXT_PRESETS, GenerationSettings, ImagePreset, ImageSettings, TextSettings
from .state import GenerationState

AutoModel.register(MMInterleavedConfig, MMInterleaved, exist_ok=True)
AutoModelForImageTextToText.register(MMInterleavedConfig, MMInterleaved, exist_ok=True)

__all__ = [
    "IMAGE_PRESETS",
    "TEXT_PRESETS",
    "ContinuousGenerator",
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
