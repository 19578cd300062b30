"""The head that makes text logits. Axes: D width, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .fused import linears


class TextHead(nn.Module):
    """Text logits: a head over the whole vocabulary, plus trainable rows for the new tokens at its end."""

    def __init__(self, width: int, vocab_size: int, num_new: int) -> None:
        super().__init__()
        self.num_new = num_new
        self.head = nn.Linear(width, vocab_size)
        self.new = nn.Linear(width, num_new)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New tokens start at a logit of -100 + 95 = -5, so that a fresh model does not emit them."""
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        nn.init.zeros_(self.new.weight)
        nn.init.constant_(self.new.bias, 95.0)
        nn.init.constant_(self.head.bias[-self.num_new :], -100.0)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., V]."""
        logits, added = linears(hidden, (self.head, self.new))
        old, new = logits.split([logits.shape[-1] - self.num_new, self.num_new], dim=-1)
        return torch.cat([old, new + added], dim=-1)
