"""MM-Interleaved: one model that reads and writes documents in which text and images alternate (arXiv 2401.10208).

    from mm_interleaved import Document, Image, MMInterleaved, MMInterleavedProcessor, Text

    model = MMInterleaved.from_pretrained(folder)
    processor = MMInterleavedProcessor.from_pretrained(folder)
    document = Document([Text("A red house."), Image()])
    for event in model.generate_interleaved(document, processor):
        print(event)

Importing the package imports neither PyTorch nor transformers; the first use of a name does.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .auto import register, register_when_imported

if TYPE_CHECKING:
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
    from .io import InputError, OutputError
    from .model import MMInterleavedConfig
    from .pipeline import MMInterleavedPipeline, PipelineOutput
    from .processor import Batch, MMInterleavedProcessor, MMInterleavedTokenizer

try:
    __version__ = version("mm-interleaved")
except PackageNotFoundError:  # a source checkout that is not installed
    __version__ = "0+source"

_PACKAGES = {
    "document": ("Document", "DocumentError", "Image", "Text", "load_documents"),
    "generation": (
        "TEXT_PRESETS", "DocumentFinished", "GenerationSettings", "ImageProgress", "ImageSettings", "MMInterleaved",
        "SegmentFinished", "TextDelta", "TextSettings",
    ),
    "io": ("InputError", "OutputError"),
    "model": ("MMInterleavedConfig",),
    "pipeline": ("MMInterleavedPipeline", "PipelineOutput"),
    "processor": ("Batch", "MMInterleavedProcessor", "MMInterleavedTokenizer"),
}  # fmt: skip
_HOMES = {name: package for package, names in _PACKAGES.items() for name in names}

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
    "InputError",
    "MMInterleaved",
    "MMInterleavedConfig",
    "MMInterleavedPipeline",
    "MMInterleavedProcessor",
    "MMInterleavedTokenizer",
    "OutputError",
    "PipelineOutput",
    "SegmentFinished",
    "Text",
    "TextDelta",
    "TextSettings",
    "load_documents",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    if _HOMES[name] not in ("document", "io"):  # which need no transformers
        register()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


register_when_imported()
