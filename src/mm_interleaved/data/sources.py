"""Types of sources: how the records of a source are read and become documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plugins import Registry

if TYPE_CHECKING:
    from .config import SourceConfig
    from .readers import Reader


@dataclass(frozen=True)
class SourceType:
    """A type of sources.

    Attributes:
        reader: makes the reader from the source's settings, its own options and the folder where relative paths start;
            raises `DataError` if they cannot be used.
        options: class of the options that only this type has, a dataclass; None: it has none.
        has_files: whether `shards` names files that it reads.
        samples: whether its documents are samples for fine-tuning, which are used whole (`packing: samples`) and may
            lack images.
    """

    reader: Callable[[SourceConfig, Any, Path], Reader]
    options: type | None = None
    has_files: bool = True
    samples: bool = False


SOURCES: Registry[SourceType] = Registry("mm_interleaved.sources", "source type", SourceType, {
    "mmc4": "mm_interleaved.data.readers:MMC4_TYPE",
    "pairs": "mm_interleaved.data.readers:PAIRS_TYPE",
    "webdataset": "mm_interleaved.data.readers:WEBDATASET_TYPE",
    "documents": "mm_interleaved.data.readers:DOCUMENTS_TYPE",
    "task": "mm_interleaved.data.task_source:TYPE",
    "messages": "mm_interleaved.data.messages:TYPE",
    "imagefolder": "mm_interleaved.data.image_folder:TYPE",
})  # fmt: skip
