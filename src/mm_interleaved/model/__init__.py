"""The network: tensors in, tensors out. It reads no file, prints nothing and knows no task."""

from transformers import AutoConfig

from .config import MMInterleavedConfig
from .mm_interleaved import MMInterleavedModel, MMInterleavedOutput

__all__ = ["MMInterleavedConfig", "MMInterleavedModel", "MMInterleavedOutput"]

AutoConfig.register("mm_interleaved", MMInterleavedConfig, exist_ok=True)
