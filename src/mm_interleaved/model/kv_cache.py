"""The KV cache: keys and values of many rows in memory that never moves, written in place.

Every row has its own length. The token at position p of a row lies in column p of that row, so a row can grow, be cut,
join or leave without touching another one, and nothing is ever padded. One column more than a row may use is spare:
padding of a batch, and rows that do not read in a decode step, write there or behind their last token, where nothing
looks.

Before a forward pass, `place` (lengths known to the host) or `place_step` (lengths on the device, for CUDA graphs) says
where the new tokens go and what they see. The layers then write and return what attention needs.

Axes: R rows of the cache, C columns, B rows of a batch, L new tokens, K key heads, N heads, H width of a head.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


@dataclass
class Placement:
    """Where the new tokens of one forward pass go, and which columns they see.

    Attributes:
        columns: [B, L] column of each new token. A token sees the columns of its row up to its own.
        positions: [B, L] position of each new token; 0 for padding.
        bound: number of columns that any of them sees.
        rows: [B] row of the cache for each row of the batch; None: row b is row b.
        start: the first column of every row, if the tokens of all rows lie in `start`, `start + 1`, ...; else None.
        masks: by attention window (None: no window) the visible columns [B, 1, L, bound], made when first needed.
    """

    columns: Tensor
    positions: Tensor
    bound: int
    rows: Tensor | None = None
    start: int | None = None
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None = None) -> Tensor | None:
        """[B, 1, L, bound] bool, True = visible; None: every new token sees all columns."""
        if self.columns.shape[1] == 1 and self.start is not None and (window is None or self.bound <= window):
            return None
        if window not in self.masks:
            place = torch.arange(self.bound, device=self.columns.device)
            visible = place <= self.columns[..., None]
            if window is not None:  # padding, in the spare column, must see something, or it would become NaN
                visible &= (place > self.columns[..., None] - window) | (self.columns[..., None] >= self.bound)
            self.masks[window] = visible[:, None]
        return self.masks[window]


class KVCacheLayer(CacheLayerMixin):
    """Keys and values [R, K, C, H] of one decoder layer. Memory is taken at the first write, on the layer's device."""

    is_sliding = False

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self._weak_cache = weakref.ref(cache)  # in a cycle the memory would wait for the garbage collector
        self.keys: Tensor
        self.values: Tensor

    @property
    def _cache(self) -> KVCache:
        cache = self._weak_cache()
        assert cache is not None
        return cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory of the type and on the device of `key_states` [B, K, L, H]."""
        rows, capacity = self._cache.rows, self._cache.capacity
        self.dtype, self.device = key_states.dtype, key_states.device
        with torch.inference_mode(False):  # others could not write into tensors of inference mode
            self.keys, self.values = (  # pyright: ignore[reportIncompatibleVariableOverride]  # read after this alone
                torch.zeros(rows, x.shape[1], capacity, x.shape[3], dtype=self.dtype, device=self.device)
                for x in (key_states, value_states)
            )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, K, L, H] where the placement says.

        Returns:
            Keys and values [B, K, bound, H] of the rows of the batch.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place, source = self._cache.placement, self._cache.source
        rows, columns = (None if x is None else x.to(self.device) for x in (place.rows, place.columns))
        found = []
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            if rows is None and place.start is not None:
                kept[:, :, place.start : place.start + new.shape[2]] = new
            else:
                own = torch.arange(len(new), device=self.device) if rows is None else rows
                kept[own[:, None], :, columns] = new.transpose(1, 2)
            if source is None:
                found.append((kept if rows is None else kept[rows])[:, :, : place.bound])
            else:
                column = torch.arange(place.bound, device=self.device)
                found.append(kept[source[:, : place.bound].to(self.device), :, column].transpose(1, 2))
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of visible columns, and the first of them."""
        return self._cache.placement.bound, 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return max(self._cache.lengths, default=0)

    def get_max_length(self) -> int:
        """Tokens that a row can hold."""
        return self._cache.capacity - 1


class KVCache(Cache):
    """Keys and values of `rows` rows of at most `capacity - 1` tokens.

    Args:
        num_layers: of the decoder.
        rows, capacity: R and C.
        device: of `device_lengths`.
        shared: whether rows may share columns (beams); see `source`.

    Attributes:
        lengths: tokens of each row, as far as the host knows. `device_lengths` [R] has them on the device.
        source: [R, C] row that holds a column of a row, so that beams share columns and change places by number; None:
            every row holds its own.
        placement: of the current forward pass.
    """

    layers: list[KVCacheLayer]

    def __init__(self, num_layers: int, rows: int, capacity: int, device: torch.device, shared: bool = False) -> None:
        self.rows, self.capacity = rows, capacity
        super().__init__(layers=[KVCacheLayer(self) for _ in range(num_layers)])
        self.lengths = [0] * rows
        self.device_lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.own = torch.arange(rows, device=device)
        self.source = self.own[:, None].repeat(1, capacity) if shared else None
        self.placement = Placement(self.own[:0, None], self.own[:0, None], 0)

    def place(self, mask: Tensor, rows: Sequence[int] | None = None) -> Placement:
        """Make place for the tokens of `mask` [B, L] (on the CPU, 1 = a token) behind the last token of `rows`.

        Raises:
            ValueError: a row cannot hold so many tokens.
        """
        chosen = range(self.rows) if rows is None else rows
        before = [self.lengths[r] for r in chosen]
        counts = mask.sum(1).tolist()
        after = [a + b for a, b in zip(before, counts, strict=True)]
        if max(after, default=0) >= self.capacity:
            raise ValueError(f"{max(after)} tokens do not fit into a KV cache of {self.capacity - 1}")
        positions = torch.where(mask == 1, torch.tensor(before)[:, None] + mask.cumsum(1) - 1, 0)
        columns = torch.where(mask == 1, positions, self.capacity - 1)
        gapless = all(count == mask.shape[1] for count in counts) and len(set(before)) == 1
        bound = max(after, default=0)
        everyone = list(chosen) == list(range(self.rows))
        device = self.device_lengths.device
        for row, length in zip(chosen, after, strict=True):
            self.lengths[row] = length
        self.device_lengths.copy_(send(torch.tensor(self.lengths), device))
        self.placement = Placement(
            send(columns, device), send(positions, device), bound,
            None if everyone else send(torch.tensor(list(chosen)), device), before[0] if gapless else None,
        )  # fmt: skip
        return self.placement

    def place_step(self, reading: Tensor, count: int = 1, known: bool = False) -> Placement:
        """Make place for `count` tokens in the rows of `reading` [R] bool; nothing waits for the device.

        Rows that do not read write behind their last token (one new token) or into the spare column (several).

        Args:
            known: whether `lengths` are those before this step and all rows read as one; attention is then limited to
                the columns in use. In a CUDA graph it cannot be.
        """
        columns = positions = self.device_lengths[:, None] + torch.arange(count, device=self.own.device)
        if count > 1:
            columns = torch.where(reading[:, None], positions, self.capacity - 1)
            positions = torch.where(reading[:, None], positions, 0)
        alike = known and len(set(self.lengths)) == 1
        bound = min(max(self.lengths) + count, self.capacity) if known else self.capacity
        if self.source is not None:
            self.source.scatter_(1, columns, self.own[:, None].expand(-1, count))
        self.placement = Placement(columns, positions, bound, None, self.lengths[0] if alike and count == 1 else None)
        self.device_lengths.add_(reading.long() * count)
        return self.placement

    def attention(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None = None) -> Tensor:
        """Attention of the new tokens over the columns that they see.

        Args:
            query: [B, N, L, H] with positions.
            keys, values: [B, K, bound, H], what `KVCacheLayer.update` returned.
            scale: of the scores.
            window: number of columns that a token sees at most, its own included; None: all.

        Returns:
            [B, N, L, H].
        """
        place, length = self.placement, query.shape[2]
        fresh = place.start == 0 and length > 1 and (window is None or length <= window)  # nothing but themselves
        mask = None if fresh else place.mask(window)
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=None if mask is None else mask.to(query.device), is_causal=fresh,
            scale=scale, enable_gqa=query.shape[1] != keys.shape[1],
        )  # fmt: skip

    def truncate(self, row: int, length: int) -> None:
        """Take back the tokens of a row from position `length` on."""
        self.lengths[row] = length
        self.device_lengths[row] = length

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say how many tokens each row has, after decode steps that the host did not follow one by one."""
        self.lengths = list(lengths)
        self.device_lengths.copy_(send(torch.tensor(self.lengths), self.device_lengths.device))

    def copy_rows(self, other: KVCache, rows: Sequence[int], places: Sequence[int]) -> None:
        """Make the rows `places` what `rows` of `other` are. The latter must hold their own columns."""
        count = max((other.lengths[r] for r in rows), default=0)
        theirs = torch.tensor(list(rows), device=self.own.device)
        ours = torch.tensor(list(places), device=self.own.device)
        for mine, given in zip(self.layers, other.layers, strict=True):
            if not given.is_initialized or not count:
                continue
            if not mine.is_initialized:
                mine.lazy_initialization(given.keys, given.values)
            for a, b in ((mine.keys, given.keys), (mine.values, given.values)):
                a[ours.to(a.device), :, :count] = b[theirs.to(b.device), :, :count]
        lengths = list(self.lengths)
        for row, place in zip(rows, places, strict=True):
            lengths[place] = other.lengths[row]
        self.set_lengths(lengths)

    def share(self, width: int) -> None:
        """Let the rows of each group of `width` use what the first of them holds. Needs `shared`."""
        assert self.source is not None
        home = self.own // width * width
        self.source.copy_(home[:, None].expand_as(self.source))
        self.set_lengths([self.lengths[r // width * width] for r in range(self.rows)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row r what row `beam_idx[r]` was; rows that share columns change places by number."""
        if self.source is None:
            super().reorder_cache(cast("torch.LongTensor", beam_idx))
            return
        self.source.copy_(self.source[beam_idx])
        self.device_lengths.copy_(self.device_lengths[beam_idx])

    def clear(self) -> None:
        """Forget all rows. What they held is overwritten with zeros, since 0 times NaN is not 0."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys.zero_()
                layer.values.zero_()
        if self.source is not None:
            self.source.copy_(self.own[:, None].expand_as(self.source))
        self.set_lengths([0] * self.rows)


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device; the host does not wait until it has arrived."""
    if device.type != "cuda":
        return x.to(device)
    return (x.pin_memory() if x.device.type == "cpu" else x).to(device, non_blocking=True)
