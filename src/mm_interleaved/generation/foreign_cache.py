"""Text generation over a cache of transformers (dynamic, static, quantized or offloaded) instead of `KVCache`.

Rows of such a cache share their columns: a column without a token of a row is masked for that row. So single rows
cannot be truncated, copied or left unchanged, and only greedy search and sampling of one sequence a row are supported.

Axes: R rows, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

from ..model import MMInterleavedModel
from ..processor import Batch


class ForeignCacheState:
    """The state of generation over a cache of transformers, for `text.write`.

    Args:
        model: the model.
        batch: the prompts.
        cache: an empty cache.

    Raises:
        ValueError: the cache is not empty.
    """

    graphs = False

    def __init__(self, model: MMInterleavedModel, batch: Batch, cache: Cache) -> None:
        if cache.get_seq_length():
            raise ValueError("past_key_values is not empty; pass a new cache, or call the model itself to extend it")
        self.model, self.cache, self.device = model, cache, model.compute_device
        self._mask = batch["attention_mask"].to(self.device)
        self.lengths: list[int] = self._mask.sum(1).tolist()
        ids, positions = batch["input_ids"].to(self.device), batch["position_ids"].to(self.device)
        hidden = self._read(ids, positions, batch.get("pixel_values"))
        last = self._mask.shape[1] - 1 - self._mask.flip(1).argmax(1)
        self._last = hidden[torch.arange(self.rows, device=self.device), last]

    @property
    def rows(self) -> int:
        """The number of rows, R."""
        return len(self._mask)

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """The logits of each row's next token, [R, V], float32 or better."""
        return self.model.compute_logits(self._last)

    def decode_step(self, tokens: Tensor, reading: Tensor) -> Tensor:
        """Process one token [R] in the rows of `reading` [R]; returns the logits of the next tokens [R, V]."""
        positions = self._mask.sum(1, keepdim=True)
        self._mask = torch.cat([self._mask, reading[:, None].long()], dim=1)
        hidden = self._read(tokens[:, None], positions, None)[:, 0]
        self._last = torch.where(reading[:, None], hidden, self._last)
        self.lengths = [n + int(on) for n, on in zip(self.lengths, reading.tolist(), strict=True)]
        return self.next_logits()

    def reserve_steps(self, steps: int) -> None:
        """Nothing to do: the cache grows by itself."""

    def settle(self, lengths: Sequence[int]) -> None:
        """Nothing to do: no steps are launched ahead."""
        assert list(lengths) == self.lengths

    @torch.no_grad()
    def _read(self, ids: Tensor, positions: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Process new tokens; returns their hidden states [R, L, D]."""
        return self.model(
            input_ids=ids, attention_mask=self._mask, position_ids=positions, pixel_values=pixel_values,
            past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        ).last_hidden_state  # fmt: skip
