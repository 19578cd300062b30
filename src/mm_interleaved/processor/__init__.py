"""Documents to tensors and back: tokenisation, image transforms, packing, labels."""

from .batch import Batch, build_labels
from .processor import MMInterleavedProcessor
from .tokenizer import IMAGE_TOKEN, SOI_TOKEN, MMInterleavedTokenizer

__all__ = ["IMAGE_TOKEN", "SOI_TOKEN", "Batch", "MMInterleavedProcessor", "MMInterleavedTokenizer", "build_labels"]
