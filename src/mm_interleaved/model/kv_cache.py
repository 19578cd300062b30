"""The KV cache: keys and values of several rows in fixed memory, written in place.

Every row has its own length. The token at position p of a row is in column p of that row. So a row can grow, be
truncated, join or leave without a change of other rows, and there is no padding. The last column is spare: padding of a
batch, and rows that take no part in a decode step, write there or after their last token, where nothing is read.

Before a forward pass, `place` (lengths known to the host) or `place_step` (lengths on the device, for CUDA graphs)
determines the columns of the new tokens and which columns are visible to them. The layers then write keys and values,
and get those that attention needs.

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
    """The columns of the new tokens of one forward pass.

    Attributes:
        columns: [B, L] column of each new token. The columns of its row up to its own are visible to a token.
        positions: [B, L] position of each new token; 0 for padding.
        bound: number of columns that are visible to any new token.
        rows: [B] row of the cache for each row of the batch; None: row b is row b.
        start: the first column, if the tokens of all rows are in columns `start`, `start + 1`, ...; else None.
        masks: by attention window (None: no window) the visible columns [B, 1, L, bound], computed on first use.
    """

    columns: Tensor
    positions: Tensor
    bound: int
    rows: Tensor | None = None
    start: int | None = None
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None = None) -> Tensor | None:
        """[B, 1, L, bound] bool, True = visible; None: all columns are visible to every new token."""
        if self.columns.shape[1] == 1 and self.start is not None and (window is None or self.bound <= window):
            return None
        if window not in self.masks:
            place = torch.arange(self.bound, device=self.columns.device)
            visible = place <= self.columns[..., None]
            if window is not None:  # padding, in the spare column, needs a visible column, or it would become NaN
                visible &= (place > self.columns[..., None] - window) | (self.columns[..., None] >= self.bound)
            self.masks[window] = visible[:, None]
        return self.masks[window]


class KVCacheLayer(CacheLayerMixin):
    """Keys and values [R, K, C, H] of one decoder layer, allocated at the first write on the layer's device."""

    is_sliding = False

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self._weak_cache = weakref.ref(cache)  # a cycle would keep the memory until garbage collection
        self.keys: Tensor
        self.values: Tensor

    @property
    def _cache(self) -> KVCache:
        cache = self._weak_cache()
        assert cache is not None
        return cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate memory of the type and on the device of `key_states` [B, K, L, H]."""
        rows, capacity = self._cache.rows, self._cache.capacity
        self.dtype, self.device = key_states.dtype, key_states.device
        with torch.inference_mode(False):  # tensors of inference mode cannot be written to outside of it
            self.keys, self.values = (  # pyright: ignore[reportIncompatibleVariableOverride]  # read after this alone
                torch.zeros(rows, x.shape[1], capacity, x.shape[3], dtype=self.dtype, device=self.device)
                for x in (key_states, value_states)
            )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, K, L, H] into the columns of the current placement.

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
        """The number of visible columns, and the first of them."""
        return self._cache.placement.bound, 0

    def get_seq_length(self) -> int:
        """Number of tokens of the longest row."""
        return max(self._cache.lengths, default=0)

    def get_max_length(self) -> int:
        """Most tokens of a row."""
        return self._cache.capacity - 1


class KVCache(Cache):
    """Keys and values of `rows` rows of at most `capacity - 1` tokens.

    Args:
        num_layers: number of decoder layers.
        rows, capacity: R and C.
        device: device of `device_lengths`.
        shared: whether rows may share columns (beams); see `source`.

    Attributes:
        lengths: number of tokens of each row, as far as the host knows; `device_lengths` [R] has it on the device.
        source: [R, C] the row that holds each column of a row, so that beams share columns and are reordered by index;
            None: every row holds its own columns.
        placement: placement of the current forward pass.
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
        """Place the tokens of `mask` [B, L] (on the CPU, 1 = a token) after the last token of `rows`.

        Raises:
            ValueError: a row would get more tokens than it can hold.
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
        """Place `count` tokens in the rows of `reading` [R] bool, without synchronisation.

        Other rows write after their last token (one new token) or into the spare column (several).

        Args:
            reading: [R] bool, the rows that get tokens.
            count: number of new tokens of each row.
            known: whether `lengths` are those before this step for all rows; attention is then limited to the columns
                in use. Not possible in a CUDA graph.
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
        """Attention of the new tokens over their visible columns.

        Args:
            query: [B, N, L, H] with positions.
            keys, values: [B, K, bound, H], the result of `KVCacheLayer.update`.
            scale: factor of the scores.
            window: most visible columns of a token, its own included; None: all.

        Returns:
            [B, N, L, H].
        """
        place, length = self.placement, query.shape[2]
        fresh = place.start == 0 and length > 1 and (window is None or length <= window)  # only new tokens
        mask = None if fresh else place.mask(window)
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=None if mask is None else mask.to(query.device), is_causal=fresh,
            scale=scale, enable_gqa=query.shape[1] != keys.shape[1],
        )  # fmt: skip

    def truncate(self, row: int, length: int) -> None:
        """Remove the tokens of a row from position `length` on."""
        self.lengths[row] = length
        self.device_lengths[row] = length

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Set the number of tokens of each row, after decode steps that were counted on the device only."""
        self.lengths = list(lengths)
        self.device_lengths.copy_(send(torch.tensor(self.lengths), self.device_lengths.device))

    def copy_rows(self, other: KVCache, rows: Sequence[int], places: Sequence[int]) -> None:
        """Copy the rows `rows` of `other` to the rows `places`. The rows of `other` must hold their own columns."""
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
        """Let the rows of each group of `width` share the columns of the first row of the group. Needs `shared`."""
        assert self.source is not None
        home = self.own // width * width
        self.source.copy_(home[:, None].expand_as(self.source))
        self.set_lengths([self.lengths[r // width * width] for r in range(self.rows)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row r by row `beam_idx[r]`. Rows that share columns are reordered by index, without copies."""
        if self.source is None:
            super().reorder_cache(cast("torch.LongTensor", beam_idx))
            return
        self.source.copy_(self.source[beam_idx])
        self.device_lengths.copy_(self.device_lengths[beam_idx])

    def clear(self) -> None:
        """Remove all rows. Keys and values are overwritten with zeros, because 0 times NaN is not 0."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys.zero_()
                layer.values.zero_()
        if self.source is not None:
            self.source.copy_(self.own[:, None].expand_as(self.source))
        self.set_lengths([0] * self.rows)


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` copied to the device without synchronisation."""
    if device.type != "cuda":
        return x.to(device)
    return (x.pin_memory() if x.device.type == "cpu" else x).to(device, non_blocking=True)
