"""What the model remembers about some rows of text and pictures, and how it reads on from there.

Reading is incremental and exact: attention is causal, positions never change, and a token sees only pictures before it,
so keys, values, hidden states and the pictures' projected maps stay valid for as long as a row grows (spec/model W11,
W12).

Rows of a batch grow unevenly. Each call of `append` adds as many columns as its longest row needs; where a row has
nothing in a column, the column is masked out for it for good. A row's real tokens are always in order.

What follows from token ids alone is computed by the host before the device has anything to do (`_Arrivals`). From then
on nothing waits for the device, which otherwise would stand still while the host starts the language model's kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..model import MMInterleavedModel
from ..model.language_model import ImageMemory
from ..model.layout import visible_images
from ..model.unet import EarlierImages
from ..model.visual_tokenizer import VisualFeatures

# Embeddings [batch, n, width], mask [batch, n] and visible pictures [batch, n, slots] of columns to read.
Read = Callable[[Tensor, Tensor, Tensor], object]
Eyes = Callable[[Tensor], VisualFeatures]  # of pictures [pictures, 3, side, side]


def _join_memory(old: ImageMemory, new: ImageMemory) -> ImageMemory:
    """Both lists of pictures; what was folded from the weights is kept."""
    values = [torch.cat(pair) for pair in zip(old.values, new.values, strict=True)]
    return ImageMemory(torch.cat([old.features, new.features]), old.shapes, values, old.derived)


class FirstAsItIs(DynamicLayer):
    """Keys and values of a layer that grow; the first ones, often thousands of columns, are kept and not copied.

    But parts of something larger are copied, lest that is kept as well, or written over.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """All keys and values [batch, key heads, columns, dim], the new ones included."""
        if self.is_initialized or not (_is_whole(key_states) and _is_whole(value_states)):
            return super().update(key_states, value_states, *args, **kwargs)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def _is_whole(x: Tensor) -> bool:
    return x.untyped_storage().nbytes() == x.numel() * x.element_size()


@dataclass
class _Arrivals:
    """What the host knows of tokens that are about to be read; its tensors are on the CPU.

    Attributes:
        rows: of the whole pictures, in their order.
        images: [batch, n, slots] pictures each token sees, most recent first, -1 = none.
        visible: [batch, slots] those that the next token of each row sees.
        gapless: whether every row has a token in every column.
    """

    rows: list[int]
    images: Tensor
    visible: Tensor
    gapless: bool

    @classmethod
    def of(cls, model: MMInterleavedModel, ids: Tensor, mask: Tensor, visible: Tensor, first: int) -> _Arrivals:
        """For `ids` and `mask` [batch, n] after tokens that left `visible` [batch, slots]; `first` numbers pictures."""
        config = model.config
        begins = (ids == config.soi_token_id) & (mask == 1)
        followed = torch.cat([ids[:, 1:] == config.image_token_id, torch.zeros_like(begins[:, :1])], dim=1)
        whole = ids.masked_fill(begins & ~followed, -1)  # without the SOI tokens of pictures still to be drawn
        images = visible_images(whole, mask, config.bos_token_id, config.soi_token_id)
        restarted = (ids == config.bos_token_id).cumsum(1) > 0
        known = visible[:, None].masked_fill(restarted[..., None], -1)
        images = _newest_first(torch.cat([torch.where(images >= 0, images + first, -1), known], dim=-1))
        slots = max(images.shape[-1], visible.shape[1])
        after = _at_last(_widen(images, slots), mask, _widen(visible, slots))
        return cls((begins & followed).nonzero()[:, 0].tolist(), images, after, bool(mask.all()))


@dataclass
class Context:
    """State of `batch` rows.

    Attributes:
        model: the model that reads.
        cache: keys and values of all columns.
        mask: [batch, columns] int64, 1 where a row has a token.
        hidden: last hidden states of all columns, in chunks [batch, n, width].
        last: [batch, width] hidden state of each row's last token.
        memory: all pictures, as the language model sees them; None before the first.
        visible: [batch, slots] pictures that the next token of each row sees, most recent first, -1 = none.
        row_images: the pictures of each row, oldest first.
        pyramids: for each picture its four maps [width, side, side], as long as the image decoder may need them.
        pending: reads what belongs to the rows but has not been needed yet.
        tokens_read: tokens that went through the language model so far, padding included.
        images_read: pictures that were encoded so far.
        gapless: whether every row is known to have a token in every column; then attention needs no mask.
        eyes: encodes pictures [pictures, 3, side, side], perhaps by a recording; None: `model.encode_images`.
    """

    model: MMInterleavedModel
    cache: DynamicCache
    mask: Tensor
    hidden: list[Tensor]
    last: Tensor
    memory: ImageMemory | None
    visible: Tensor
    row_images: list[list[int]]
    pyramids: list[list[Tensor] | None]
    pending: Callable[[], object] | None = None
    tokens_read: int = 0
    images_read: int = 0
    gapless: bool = True
    eyes: Eyes | None = None

    @classmethod
    def empty(cls, model: MMInterleavedModel, batch: int, eyes: Eyes | None = None) -> Context:
        """Nothing read yet; `eyes` as of the class."""
        device, width = model.compute_device, model.config.text_config.hidden_size
        nothing = torch.zeros(batch, 0, dtype=torch.long, device=device)
        last = torch.zeros(batch, width, dtype=model.dtype, device=device)
        cache = DynamicCache(config=model.config.text_config)
        cache.layers = [FirstAsItIs() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cls(model, cache, nothing, [], last, None, nothing, [[] for _ in range(batch)], [], eyes=eyes)

    @property
    def lengths(self) -> Tensor:
        """[batch] tokens of each row."""
        return self.mask.sum(1)

    def encode(self, pixel_values: Tensor) -> VisualFeatures:
        """Features of `pixel_values` [pictures, 3, image_size, image_size]."""
        return (self.eyes or self.model.encode_images)(pixel_values)

    def defer(self, read: Callable[[], object]) -> None:
        """Call `read`, one of the `append` methods, as soon as something depends on it; perhaps never."""
        self.flush()
        self.pending = read

    def flush(self) -> None:
        """Read what was deferred."""
        if self.pending is not None:
            read, self.pending = self.pending, None
            read()

    @torch.no_grad()
    def append(self, input_ids: Tensor, mask: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Read on.

        Args:
            input_ids: [batch, n]; may hold whole pictures, and a begin-of-image token at the end of a row whose picture
                is still to be drawn.
            mask: [batch, n], 0 where a row has nothing.
            pixel_values: [pictures, 3, image_size, image_size] of the whole pictures, row by row.

        Returns:
            Hidden states [batch, n, width] of the new columns.

        Raises:
            ValueError: the number of image tokens does not fit that of the pictures.
        """
        self.flush()
        count = 0 if pixel_values is None else len(pixel_values)
        ids = input_ids.cpu()
        if count:
            self.model.check_slots(ids, count)
        first = 0 if self.memory is None or not count else len(self.memory)
        new = _Arrivals.of(self.model, ids, mask.cpu(), self.visible.cpu(), first)
        input_ids, mask, images, visible = (
            send(x, self.mask.device) for x in (input_ids, mask, new.images, new.visible)
        )
        features = self.encode(pixel_values) if count else None
        if features is not None:
            self._add_images(features, new.rows)
        embeds = self.model.embed(input_ids, features.tokens if features else None, checked=True)
        hidden = self._read(embeds, mask, images, new.gapless)
        self.visible = visible
        return hidden

    @torch.no_grad()
    def append_text(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Like `append` for plain text without `<s>` and pictures; cheaper."""
        self.flush()
        images = self.visible[:, None].expand(-1, input_ids.shape[1], -1)
        gapless = mask.device.type == "cpu" and bool(mask.all())  # elsewhere the host would have to wait to know
        return self._read(self.model.embed(input_ids, None), mask, images, gapless)

    @torch.no_grad()
    def append_images(self, rows: list[int], pixel_values: Tensor) -> None:
        """Read the pictures that `rows`, each ending with a begin-of-image token, have been waiting for."""
        self.flush()
        self.append_features(rows, self.encode(pixel_values))

    @torch.no_grad()
    def append_features(self, rows: list[int], features: VisualFeatures, read: Read | None = None) -> None:
        """`append_images` of pictures that are encoded already; `read` reads the columns, None: as everything is."""
        first = self._add_images(features, rows)
        batch, count = len(self.mask), features.tokens.shape[1]
        newest = torch.full((batch, 1), -1, dtype=torch.long, device=self.mask.device)
        newest[rows, 0] = torch.arange(first, first + len(rows), device=self.mask.device)
        self.visible = _newest_first(torch.cat([newest, self.visible], dim=1))
        mask = torch.zeros(batch, count, dtype=torch.long, device=self.mask.device)
        mask[rows] = 1
        embeds = torch.zeros(batch, count, features.tokens.shape[-1], dtype=features.tokens.dtype, device=mask.device)
        embeds[rows] = features.tokens
        images = torch.where(mask[..., None] == 1, self.visible[:, None], -1)
        (read or partial(self._read, gapless=len(set(rows)) == batch))(embeds, mask, images)

    def _read(self, embeds: Tensor, mask: Tensor, images: Tensor, gapless: bool = False) -> Tensor:
        positions = (self.lengths[:, None] + mask.cumsum(1) - 1).clamp(min=0)
        self.mask = torch.cat([self.mask, mask], dim=1)
        images = images.masked_fill(mask[..., None] == 0, -1)
        if self.memory is None:
            self.memory = self.model.remember(self.model.empty_pyramid())
        self.gapless &= gapless
        seen = None if self.gapless else self.mask
        hidden = self.model.decode(embeds, self.memory, images, seen, positions, self.cache)
        self._keep(hidden, mask)
        return hidden

    def _keep(self, hidden: Tensor, mask: Tensor) -> None:
        self.hidden.append(hidden)
        self.last = _at_last(hidden, mask, self.last)
        self.tokens_read += mask.numel()

    def extend(self, hidden: Tensor, mask: Tensor) -> None:
        """Take over columns of plain text that were read elsewhere, their keys and values being in `cache` already.

        Args:
            hidden: [batch, n, width] last hidden states.
            mask: [batch, n], 0 where a row has nothing.
        """
        self.mask, self.gapless = torch.cat([self.mask, mask], dim=1), False
        self._keep(hidden, mask)

    def _add_images(self, features: VisualFeatures, rows: list[int]) -> int:
        """Remember new pictures of `rows`; the number of the first."""
        memory = self.model.remember(features.pyramid, self.memory)
        first = 0 if self.memory is None else len(self.memory)
        self.memory = memory if self.memory is None else _join_memory(self.memory, memory)
        self.images_read += len(rows)
        keep = self.model.config.image_decoder.previous_images
        for offset, row in enumerate(rows):
            self.row_images[row].append(first + offset)
            self.pyramids.append([m[offset] for m in features.pyramid])
        needed = {image for images in self.row_images for image in images[-keep:]}
        self.pyramids = [p if i in needed else None for i, p in enumerate(self.pyramids)]
        return first

    def select(self, rows: Tensor) -> Context:
        """A context of the given rows (any may repeat), which can read on without touching this one."""
        self.flush()
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        chosen = rows.tolist()
        if chosen != list(range(len(self.mask))):  # what grows makes new tensors, so that all rows can be shared
            cache.reorder_cache(rows)
        return Context(
            self.model,
            cache,
            self.mask[rows],
            [],
            self.last[rows],
            self.memory,
            self.visible[rows],
            [list(self.row_images[r]) for r in chosen],
            list(self.pyramids),
            gapless=self.gapless,
            eyes=self.eyes,
        )

    def reorder(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` was."""
        self.flush()
        self.cache.reorder_cache(rows)
        self.mask, self.last, self.visible = self.mask[rows], self.last[rows], self.visible[rows]

    def forget(self, row: int, since: int) -> None:
        """Take back the text of a row from column `since` on; `<s>` at least must stand before it."""
        self.flush()
        self.mask[row, since:], self.gapless = 0, False
        self.hidden = [torch.cat(self.hidden, dim=1)]
        self.last[row] = self.hidden[0][row, self.mask[row].nonzero()[-1, 0]]

    def image_context(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """All that was read of `rows`, last token first: projected [rows, longest, width], mask [rows, longest]."""
        self.flush()
        self.hidden = [torch.cat(self.hidden, dim=1)]
        texts = [self.hidden[0][row, self.mask[row] == 1].flip(0) for row in rows]
        context = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(t) for t in texts], device=context.device)
        mask = (torch.arange(context.shape[1], device=context.device) < lengths[:, None]).long()
        return self.model.project_context(context, mask), mask

    def earlier_images(self, rows: list[int]) -> EarlierImages:
        """The pictures that condition the next drawing of each of `rows`."""
        keep = self.model.config.image_decoder.previous_images
        seen = [self.row_images[row][-keep:][::-1] for row in rows]
        needed = sorted({image for images in seen for image in images})
        pyramid = self.model.empty_pyramid()
        if needed:
            pyramid = [torch.stack(maps) for maps in zip(*(self.pyramids[i] for i in needed), strict=True)]
        width = max(len(images) for images in seen)
        numbers = [[needed.index(i) for i in images] + [-1] * (width - len(images)) for images in seen]
        images = torch.tensor(numbers, dtype=torch.long, device=self.mask.device).view(len(rows), width)
        return EarlierImages.build(pyramid, images)


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device; the host does not wait until it has arrived."""
    if device.type != "cuda":
        return x.to(device)
    return (x.pin_memory() if x.device.type == "cpu" else x).to(device, non_blocking=True)


def _newest_first(images: Tensor) -> Tensor:
    """Entries in order, all -1 moved to the end: [..., slots] to [..., fewest slots that hold them]."""
    order = torch.argsort((images < 0).int(), dim=-1, stable=True)
    images = images.gather(-1, order)
    return images[..., : int((images >= 0).sum(-1).max()) if images.numel() else 0]


def _widen(images: Tensor, slots: int) -> Tensor:
    """Entries followed by -1 up to `slots`: [..., slots]."""
    return torch.nn.functional.pad(images, (0, slots - images.shape[-1]), value=-1)


def _at_last(values: Tensor, mask: Tensor, otherwise: Tensor) -> Tensor:
    """`values` [batch, n, size] at the last column of each row that `mask` shows, else `otherwise` [batch, size]."""
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    found = values[torch.arange(len(mask), device=mask.device), last]
    return torch.where(mask.any(1)[:, None], found, otherwise)
