"""Documents to tensors and back: tokenisation, image transforms, packing, labels."""

from transformers import AutoProcessor, AutoTokenizer

from ..model.config import MMInterleavedConfig
from .batch import Batch, build_labels
from .processor import MMInterleavedProcessor
from .tokenizer import IMAGE_TOKEN, SOI_TOKEN, MMInterleavedTokenizer

__all__ = ["IMAGE_TOKEN", "SOI_TOKEN", "Batch", "MMInterleavedProcessor", "MMInterleavedTokenizer", "build_labels"]

AutoProcessor.register(MMInterleavedConfig, MMInterleavedProcessor, exist_ok=True)
AutoTokenizer.register(MMInterleavedConfig, slow_tokenizer_class=MMInterleavedTokenizer, exist_ok=True)
