"""The network: tensors in, tensors out. It reads no file, prints nothing and knows no task."""

from .config import MMInterleavedConfig
from .mm_interleaved import MMInterleavedModel, MMInterleavedOutput

__all__ = ["MMInterleavedConfig", "MMInterleavedModel", "MMInterleavedOutput"]
