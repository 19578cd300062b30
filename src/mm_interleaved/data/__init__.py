"""Training data: sources, rows, mixtures and batches."""

from .config import DataConfig, ReplayConfig, SourceConfig
from .loader import DocumentLoader, build_loader, leave_process_group
from .report import DataError, DataReport

__all__ = [
    "DataConfig", "DataError", "DataReport", "DocumentLoader", "ReplayConfig", "SourceConfig", "build_loader",
    "leave_process_group",
]  # fmt: skip
