"""The reference implementation of the interleaved generator: every turn recomputes everything, as in the original.

Tests compare the two; benchmarks show what the KV cache saves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..processor.packing import TokenStream
from .interleaved import InterleavedGenerator
from .state import GenerationState


class RecomputingGenerator(InterleavedGenerator):
    """Yields the same events as `InterleavedGenerator`, at a cost that grows with the square of the document.

    Attributes:
        tokens_read, images_read: numbers of tokens and images processed in all turns.
    """

    tokens_read = 0
    images_read = 0

    def _read(self, chosen: Sequence[int], most: int | None = None) -> None:
        streams = []
        for index, row in enumerate(self.rows):
            if index in chosen:
                row.unread, row.unread_image = TokenStream.empty(), None
            ids = np.array(row.ids, np.int64)
            streams.append(TokenStream(ids, np.ones(len(ids), bool), list(row.images)))
        if not chosen:
            return
        batch = self.processor.collate([streams[i] for i in chosen], padding_side="left")
        self.state = GenerationState(self.model, len(self.rows))
        self.state.prefill(batch.input_ids, batch.attention_mask, batch.pixel_values, chosen)
        self.tokens_read += self.state.tokens_read
        self.images_read += self.state.images_read
