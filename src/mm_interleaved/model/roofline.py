"""Lower bounds of the time that work takes, from its operations and its bytes.

Only unavoidable work counts: every weight in use, every cached key and value and every image sample is read once a
call, and matrix products are computed once. The bound is the larger of the times for memory and for arithmetic.

Axes: B rows, L tokens, I images, S spatial positions of all levels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .cost import Cost
from .language_model import synchronizers
from .mm_interleaved import MMInterleavedModel
from .weights import stored


@dataclass
class Need:
    """Operations (a multiply-accumulate is two) and bytes."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Need) -> Need:
        """The sum of two works."""
        return Need(self.operations + other.operations, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Need:
        """The work done `times` times."""
        return Need(self.operations * times, self.bytes * times)

    def seconds(self, bytes_per_second: float, operations_per_second: float) -> float:
        """The bound in seconds on a machine of that speed."""
        return max(self.bytes / bytes_per_second, self.operations / operations_per_second)


def _size(*modules: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for m in modules for p in m.parameters() for t in stored(p))


def decoding(model: MMInterleavedModel, cost: Cost, columns: int, images: int, rows: int = 1) -> Need:
    """The work of one token of `rows` rows that share `columns` columns and `images` visible images.

    The query side of MMFS counts with derived weights, and each of its samples as four neighbours.
    """
    language, text, mmfs = model.language_model, model.config.text_config, model.config.mmfs
    element = language.norm.weight.element_size()
    layers = synchronizers(language)
    outputs = mmfs.num_heads * mmfs.num_points * (2 + len(mmfs.levels))
    derived = len(layers) * text.hidden_size * (outputs * (images > 0) + mmfs.hidden_size) * element
    samples = len(layers) * images * len(mmfs.levels) * mmfs.num_points * mmfs.hidden_size * 4
    attention = 2 * 2 * columns * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    per_token = cost.token + (cost.token_with_images - cost.token) * (images > 0)
    return Need(
        operations=rows * (2 * per_token + attention),
        bytes=_size(language.layers, language.norm, model.lm_head) - _size(*layers) + derived
        + (columns * cost.cache_per_token + rows * samples) * element,
    )  # fmt: skip


def prefill(model: MMInterleavedModel, cost: Cost, length: int, images: int) -> Need:
    """The work of a prefill of `length` tokens, including the encoding of its images."""
    text = model.config.text_config
    head = text.hidden_size * model.config.vocab_size
    attention = 2 * length * length * text.num_attention_heads * text.head_dim * text.num_hidden_layers  # causal
    macs = length * (cost.token_with_images - head) + images * cost.encode_image
    return Need(2 * macs + attention, _size(model.language_model, model.visual_tokenizer))


def image(model: MMInterleavedModel, cost: Cost) -> Need:
    """The work of an image of `cost.steps` guided steps, from its context to its pixels."""
    decoder = model.image_decoder
    return Need(2 * cost.draw_image, cost.steps * _size(decoder.unet) + _size(decoder.vae, decoder.resampler))
