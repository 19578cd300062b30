"""The plain twin of the interleaved generator: reads everything anew at every turn, as the original does.

For tests, which hold the two together, and for benchmarks, which show what the caches save.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..processor.packing import TokenStream
from .context import Context
from .interleaved import Event, InterleavedGenerator


class RecomputingGenerator(InterleavedGenerator):
    """Same events as `InterleavedGenerator`, at a cost that grows with the square of the document.

    Attributes:
        tokens_read, images_read: over all turns.
    """

    tokens_read = 0
    images_read = 0

    def _advance(self) -> Iterator[Event]:
        yield from super()._advance()
        if all(row.reason is not None for row in self.rows):
            return
        streams = []
        for row in self.rows:
            ids = np.array(row.ids, np.int64)
            streams.append(TokenStream(ids, np.ones(len(ids), bool), list(row.images)))
        batch = self.processor.collate(streams, padding_side="left")
        self.context = Context.empty(self.model, len(self.rows))
        self.context.append(batch.input_ids, batch.attention_mask, batch.pixel_values)
        self.tokens_read += self.context.tokens_read
        self.images_read += self.context.images_read
