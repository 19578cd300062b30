"""MM-Interleaved: one model that reads and writes documents in which text and images alternate (arXiv 2401.10208).

from mm_interleaved import Document, Image, MMInterleaved, MMInterleavedProcessor, Text

model = MMInterleaved.from_pretrained(folder)
processor = MMInterleavedProcessor.from_pretrained(folder)
document = Document([Text("A red house."), Image()])
for event in model.generate_interleaved(document, processor):
    print(event)
"""

from __future__ import annotations

from importlib.metadata import version

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from .document import Document, DocumentError, Image, Text, load_documents
from .generation import (
    TEXT_PRESETS,
    DocumentFinished,
    GenerationSettings,
    ImageProgress,
    ImageSettings,
    MMInterleaved,
    SegmentFinished,
    TextDelta,
    TextSettings,
)
from .model import MMInterleavedConfig
from .processor import Batch, MMInterleavedProcessor, MMInterleavedTokenizer

__version__ = version("mm-interleaved")

AutoConfig.register("mm_interleaved", MMInterleavedConfig)
AutoModel.register(MMInterleavedConfig, MMInterleaved)
AutoModelForImageTextToText.register(MMInterleavedConfig, MMInterleaved)
AutoProcessor.register(MMInterleavedConfig, MMInterleavedProcessor)
AutoTokenizer.register(MMInterleavedConfig, slow_tokenizer_class=MMInterleavedTokenizer)

__all__ = [
    "TEXT_PRESETS",
    "Batch",
    "Document",
    "DocumentError",
    "DocumentFinished",
    "GenerationSettings",
    "Image",
    "ImageProgress",
    "ImageSettings",
    "MMInterleaved",
    "MMInterleavedConfig",
    "MMInterleavedProcessor",
    "MMInterleavedTokenizer",
    "SegmentFinished",
    "Text",
    "TextDelta",
    "TextSettings",
    "load_documents",
]
