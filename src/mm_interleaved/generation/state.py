"""The state of generation: what the model has processed of some rows of text and images.

Rows are extended incrementally, and the result is exact: attention is causal, positions never change, and only earlier
images are visible to a token. So keys, values, hidden states and MMFS values of images stay valid while a row grows.

Rows are independent: each has its own length and its own images, and extending some rows does not change the others.
Everything that follows from token ids is computed on the host, before the device starts. After that nothing
synchronises with the device.

Axes: R rows, B rows of one call, L new tokens, D width, I images, S slots for visible images, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import MMInterleavedModel
from ..model.kv_cache import send
from ..model.language_model import image_features, synchronizers
from ..model.layout import visible_images
from ..model.mmfs import VisibleImages
from ..model.unet import EarlierImages
from ..model.visual_tokenizer import VisualFeatures
from .image_encoder import encode_images
from .workspace import POOL, Capacity, Workspace

Images = list[int]  # numbers of images, most recent first
SHORT = 3  # a prefill of at most so many text tokens runs as captured decode steps


@dataclass
class _Arrivals:
    """What follows from the ids of new tokens, computed on the host.

    Attributes:
        rows: row of the batch of each whole image, in their order.
        images: [B, L, S] visible images of each token, most recent first, -1 = none.
        visible: for each row the visible images of its next token.
    """

    rows: list[int]
    images: Tensor
    visible: list[Images]

    @classmethod
    def of(
        cls, model: MMInterleavedModel, ids: Tensor, mask: Tensor, visible: Sequence[Images], places: Sequence[int]
    ) -> _Arrivals:
        """For `ids` and `mask` [B, L] on the CPU, after `visible` of earlier tokens; `places` are the new images'."""
        config = model.config
        begins = (ids == config.soi_token_id) & (mask == 1)
        followed = torch.cat([ids[:, 1:] == config.image_token_id, torch.zeros_like(begins[:, :1])], dim=1)
        whole = ids.masked_fill(begins & ~followed, -1)  # without SOI tokens whose images are not generated yet
        images = visible_images(whole, mask, config.bos_token_id, config.soi_token_id)
        restarted = (ids == config.bos_token_id).cumsum(1) > 0
        known = _padded(visible)[:, None].masked_fill(restarted[..., None], -1)
        known = known.expand(-1, ids.shape[1], -1)
        numbers = torch.tensor([*places, -1])  # the last one for "none"
        images = _newest_first(torch.cat([numbers[images], known], dim=-1))
        images = images.masked_fill(mask[..., None] == 0, -1)
        after = [list(v) for v in visible]
        for row, tokens in enumerate(mask):
            real = tokens.nonzero()[:, 0]
            if len(real):
                after[row] = [i for i in images[row, real[-1]].tolist() if i >= 0]
        return cls((begins & followed).nonzero()[:, 0].tolist(), images, after)


class GenerationState:
    """Rows of text and images that the model has processed and can extend.

    Its memory is leased (`workspace.py`) and returns to the pool when the state is freed. Derived weights are computed
    when a state is made, so one state is one generation call.

    Args:
        model: the model.
        rows: number of rows, R.
        graphs: whether decode steps and the reading of images are captured in CUDA graphs.
        tokens, slots, images: initial capacity; it grows when needed. A row never exceeds the model's context.
        shared: whether rows share columns (beams).

    Attributes:
        visible: for each row the visible images of its next token, most recent first.
        row_images: the images of each row, oldest first.
        pyramids: for each image its four maps [vision width, side, side], while the image decoder may need them.
        tokens_read: number of tokens that went through the language model so far, padding included.
        images_read: number of images that were encoded so far.
    """

    def __init__(
        self,
        model: MMInterleavedModel,
        rows: int,
        graphs: bool = False,
        *,
        tokens: int = 0,
        slots: int = 0,
        images: int = 0,
        shared: bool = False,
    ) -> None:
        self.model, self.graphs = model, graphs
        self.visible: list[Images] = [[] for _ in range(rows)]
        self.row_images: list[list[int]] = [[] for _ in range(rows)]
        self.pyramids: list[list[Tensor] | None] = []
        self.tokens_read = self.images_read = 0
        self._logits_known = False
        self._lease(Capacity(rows, min(tokens, model.context_length) + 1, slots, images, shared))

    # ---- what has been processed

    @property
    def rows(self) -> int:
        """The number of rows, R."""
        return len(self.visible)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each row."""
        return self.workspace.cache.lengths

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self.workspace.last.device

    @property
    def last(self) -> Tensor:
        """The hidden state of each row's last token, [R, D]."""
        return self.workspace.last

    def hidden(self, row: int) -> Tensor:
        """The hidden states of all tokens of a row, [length, D]."""
        return self.workspace.hidden[row, : self.lengths[row]]

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """The logits of each row's next token, [R, V], float32 or better; overwritten by the next decode step."""
        if not self._logits_known:
            self.workspace.logits.copy_(self.model.compute_logits(self.last))
            self._logits_known = True
        return self.workspace.logits

    # ---- memory

    def _lease(self, need: Capacity) -> None:
        workspace = POOL.lease(self.model, need, self.graphs)
        self.workspace: Workspace = workspace
        self._give_back = weakref.finalize(self, POOL.give_back, weakref.ref(self.model), workspace)

    def _reserve(self, tokens: int, slots: int, images: int) -> None:
        """Grow the capacity to rows of so many tokens, and so many images; the content stays.

        Raises:
            ValueError: more images would be visible to a token than the model distinguishes.
        """
        most = self.model.config.mmfs.max_images - 1
        if slots > most:
            raise ValueError(
                f"{slots} images are visible at once, but this model distinguishes at most {most}; split the document"
            )
        before = self.workspace
        need = Capacity(self.rows, tokens + 1, slots, images, before.capacity.shared)
        if before.capacity.holds(need):
            return
        held = before.capacity
        if tokens + 1 > held.columns and self.device.type == "cpu":
            tokens = max(tokens, 2 * held.columns)  # growing copies everything, so it should be rare
        give_back = self._give_back
        self._lease(Capacity(self.rows, max(tokens + 1, held.columns), max(slots, held.slots),
                             max(images, held.images), held.shared))  # fmt: skip
        self.workspace.take_over(before, list(range(self.rows)), 1, len(self.pyramids))
        self._logits_known = False  # they are in the previous memory
        self._show_images()
        give_back()

    def branch(self, rows: Sequence[int], width: int = 1, tokens: int = 0) -> GenerationState:
        """A new state with copies of the given rows; extending it does not change this one.

        Args:
            rows: rows of this state; any may repeat.
            width: number of copies of each, which share their columns. The copies of the first row come first.
            tokens: initial capacity for further tokens.
        """
        longest = max((self.lengths[r] for r in rows), default=0)
        chosen = [r for r in rows for _ in range(width)]
        slots = max((len(self.visible[r]) for r in rows), default=0)
        count = len(self.pyramids)
        state = self._another(len(chosen), tokens=longest + tokens, slots=slots, images=count, shared=width > 1)
        state.workspace.take_over(self.workspace, list(rows), width, count)
        state.visible = [list(self.visible[r]) for r in chosen]
        state.row_images = [list(self.row_images[r]) for r in chosen]
        state.pyramids = list(self.pyramids)
        state._show_images()
        return state

    def _another(self, rows: int, *, tokens: int, slots: int, images: int, shared: bool) -> GenerationState:
        """An empty state of the same kind; arguments as in the constructor."""
        return GenerationState(self.model, rows, self.graphs, tokens=tokens, slots=slots, images=images, shared=shared)

    def _show_images(self) -> None:
        """Copy the visible images of each row to the device."""
        slots = self.workspace.capacity.slots
        self.workspace.visible.copy_(send(_padded(self.visible, slots), self.device))

    # ---- extending rows

    @torch.no_grad()
    def prefill(
        self, input_ids: Tensor, mask: Tensor, pixel_values: Tensor | None = None, rows: Sequence[int] | None = None
    ) -> Tensor:
        """Process text and whole images.

        Args:
            input_ids: [B, L]; may hold whole images, and a begin-of-image token at the end of a row whose image is not
                generated yet.
            mask: [B, L], 0 at padding.
            pixel_values: [I, 3, image_size, image_size] of the whole images, row by row.
            rows: the row of the state for each row of the batch; None: all, in order.

        Returns:
            Hidden states [B, L, D] of the new tokens.

        Raises:
            ValueError: the number of image tokens does not fit that of the images, or a row becomes longer than the
                model's context.
        """
        chosen = list(range(self.rows)) if rows is None else list(rows)
        ids, mask = input_ids.cpu(), mask.cpu()
        count = 0 if pixel_values is None else len(pixel_values)
        self.model.check_image_tokens(ids, count)
        longest = max(self.lengths[r] + n for r, n in zip(chosen, mask.sum(1).tolist(), strict=True))
        self._check_length(longest)
        if self.graphs and not count and ids.shape[1] <= SHORT and not (ids == self.model.config.bos_token_id).any():
            return self._prefill_by_steps(ids, mask, chosen)
        places = self._places(count)
        new = _Arrivals.of(self.model, ids, mask, [self.visible[r] for r in chosen], places)
        self._reserve(longest, max(new.images.shape[-1], *(len(v) for v in new.visible), 0), self._needed(places))
        ids = send(ids, self.device)
        with self._undone_on_error():
            features = None
            if pixel_values is not None and count:
                features = self._encode(pixel_values, [chosen[r] for r in new.rows], places)
            embeds = self.model.embed(ids, features.tokens if features else None, checked=True)
            hidden = self._forward(embeds, mask, new.images, rows)
        for row, visible in zip(chosen, new.visible, strict=True):
            self.visible[row] = visible
        self._show_images()
        return hidden

    def _prefill_by_steps(self, ids: Tensor, mask: Tensor, chosen: list[int]) -> Tensor:
        """`prefill` of few text tokens by captured decode steps, which are faster than an uncaptured forward pass."""
        self.reserve_steps(ids.shape[1])
        lengths, found, index = list(self.lengths), [], send(torch.tensor(chosen), self.device)
        for column in range(ids.shape[1]):
            tokens = torch.zeros(self.rows, dtype=torch.long)
            reading = torch.zeros(self.rows, dtype=torch.bool)
            tokens[chosen], reading[chosen] = ids[:, column], mask[:, column] == 1
            self.decode_step(tokens, reading)
            found.append(self.last[index])
        for row, count in zip(chosen, mask.sum(1).tolist(), strict=True):
            lengths[row] += count
        self.workspace.cache.set_lengths(lengths)
        return torch.stack(found, dim=1)

    @torch.no_grad()
    def append_images(self, rows: Sequence[int], pixel_values: Tensor) -> None:
        """Process the images [B, 3, image_size, image_size] of `rows`, each of which ends with a begin-of-image token.

        Raises:
            ValueError: a row becomes longer than the model's context, or gets more images than the model distinguishes.
        """
        count, places = self.model.config.num_image_tokens, self._places(len(rows))
        visible = list(self.visible)
        for place, row in zip(places, rows, strict=True):
            visible[row] = [place, *visible[row]]
        longest = max(self.lengths[r] for r in rows) + count
        self._check_length(longest)
        self._reserve(longest, max(len(v) for v in visible), self._needed(places))
        with self._undone_on_error():
            tokens = self._encode(pixel_values, list(rows), places).tokens
            self.visible = visible
            self._show_images()
            if self.graphs:
                self._append_block(list(rows), tokens)
            else:
                images = _padded([self.visible[r] for r in rows])[:, None].expand(-1, count, -1)
                self._forward(tokens, torch.ones(len(rows), count, dtype=torch.long), images, rows)

    def _append_block(self, rows: list[int], tokens: Tensor) -> None:
        """Process the tokens [B, L, D] of one image in each of `rows` by a captured step."""
        workspace, count = self.workspace, tokens.shape[1]
        index = send(torch.tensor(rows), self.device)
        assert workspace.block is not None  # since steps are captured
        workspace.block[index] = tokens.to(workspace.block.dtype)
        workspace.reading.copy_(send(torch.tensor([r in rows for r in range(self.rows)]), self.device))
        workspace.step_block()
        for row in rows:
            workspace.cache.lengths[row] += count
        self.tokens_read += self.rows * count
        self._logits_known = True

    @torch.no_grad()
    def decode_step(self, tokens: Tensor, reading: Tensor, count: bool = False) -> Tensor:
        """Process one text token in some rows.

        With CUDA graphs there is no synchronisation, and `lengths` are not updated until `settle`, but with `count`.

        Args:
            tokens: [R]; arbitrary in rows that get no token.
            reading: [R] bool, the rows that get a token.
            count: whether `lengths` are updated in any case; `reading` is then on the CPU.

        Returns:
            The logits of the next tokens [R, V], as `next_logits`.
        """
        workspace = self.workspace
        workspace.tokens.copy_(send(tokens, self.device))
        workspace.reading.copy_(send(reading, self.device))
        workspace.step(len(self.pyramids), max(map(len, self.visible)))
        if count or not self.graphs:
            workspace.cache.lengths = [a + b for a, b in zip(self.lengths, reading.long().tolist(), strict=True)]
        self.tokens_read += self.rows
        self._logits_known = True
        return workspace.logits

    def settle(self, lengths: Sequence[int]) -> None:
        """Set the number of tokens of each row after decode steps; further tokens are removed."""
        cache = self.workspace.cache
        read = cache.device_lengths.tolist() if self.graphs else list(cache.lengths)
        cache.set_lengths(lengths)
        for row, (now, wanted) in enumerate(zip(read, lengths, strict=True)):
            if now != wanted:
                self.truncate(row, wanted)

    def reserve_steps(self, steps: int) -> None:
        """Grow the capacity for so many decode steps, so that none of them has to."""
        self._reserve(max(self.lengths, default=0) + steps, max(map(len, self.visible)), len(self.pyramids))

    def truncate(self, row: int, length: int) -> None:
        """Remove the text tokens of a row from position `length` on."""
        self.workspace.cache.truncate(row, length)
        self.last[row] = self.workspace.hidden[row, length - 1] if length else 0
        self._logits_known = False

    def evict(self, row: int) -> None:
        """Empty a row, so that it can take another document; the other rows do not change."""
        self.rewind(row, 0, 0)

    def rewind(self, row: int, length: int, images: int) -> bool:
        """Keep the first `length` tokens of a row, with its first `images` images; the other rows do not change.

        The kept tokens must hold one `<s>` at most, at the start, and no part of another image.

        Returns:
            Whether that was possible. It is not, and nothing changes, if the features of an image that the image
            decoder would need are not kept any more.
        """
        kept = self.row_images[row][:images]
        needed = kept[max(images - self.model.config.image_decoder.previous_images, 0) :]
        if any(self.pyramids[image] is None for image in needed):
            return False
        self.row_images[row], self.visible[row] = kept, kept[::-1]
        self.truncate(row, length)
        self._show_images()
        return True

    def reorder(self, rows: Tensor) -> None:
        """Replace row i by row `rows[i]`; both must be copies of one row (see `branch`)."""
        self.workspace.cache.reorder_cache(rows)
        self.last.copy_(self.last[rows])

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Restore the state if the block fails, so that the rows can still be extended."""
        lengths, visible, pyramids = list(self.lengths), list(self.visible), list(self.pyramids)
        row_images = [list(images) for images in self.row_images]
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            if not succeeded:
                self.visible, self.row_images, self.pyramids = visible, row_images, pyramids
                self.workspace.cache.set_lengths(lengths)
                self._show_images()

    def _check_length(self, longest: int) -> None:
        if longest > self.model.context_length:
            raise ValueError(f"{longest} tokens are more than the {self.model.context_length} of the model's context")

    def _forward(self, embeds: Tensor, mask: Tensor, images: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Run the language model on `embeds` [B, L, D] in `rows`; `mask` [B, L] and `images` [B, L, S] on the CPU."""
        workspace = self.workspace
        place = workspace.cache.place(mask, rows)
        visible = VisibleImages.build(send(images.flatten(0, 1), self.device), len(self.pyramids))
        known = workspace.images_of(len(self.pyramids))
        hidden = self.model.decode(embeds, known, visible, None, place.positions, workspace.cache)
        own = workspace.cache.own if place.rows is None else place.rows
        workspace.hidden[own[:, None], place.columns] = hidden.to(workspace.hidden.dtype)
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        found = hidden[torch.arange(len(hidden), device=hidden.device), send(last, self.device)]
        some = send(mask.any(1), self.device)[:, None]
        workspace.last[own] = torch.where(some, found, workspace.last[own]).to(workspace.last.dtype)
        self.tokens_read += mask.numel()
        self._logits_known = False
        return hidden

    def _places(self, count: int) -> list[int]:
        """Numbers for `count` new images: those of images that no row has any more, then new ones."""
        used = {image for images in self.row_images for image in images}
        unused = [place for place in range(len(self.pyramids)) if place not in used][:count]
        return [*unused, *range(len(self.pyramids), len(self.pyramids) + count - len(unused))]

    def _needed(self, places: Sequence[int]) -> int:
        """The number of images that memory is needed for, with new ones at `places`."""
        return max(len(self.pyramids), max(places, default=-1) + 1)

    def _encode(self, pixel_values: Tensor, rows: list[int], places: Sequence[int]) -> VisualFeatures:
        """Encode images of `rows`, and store their features for later tokens and for the image decoder."""
        features = encode_images(self.model, pixel_values, self.graphs)
        index = send(torch.tensor(places), self.device)
        maps = image_features(self.model.config, features.pyramid).features
        values = self.workspace.images.values
        assert values is not None
        for kept, synchronizer in zip(values, synchronizers(self.model.language_model), strict=True):
            kept[index.to(kept.device)] = synchronizer.project(maps).to(kept)
        self.images_read += len(rows)
        keep = self.model.config.image_decoder.previous_images
        self.pyramids += [None] * (self._needed(places) - len(self.pyramids))
        for offset, (row, place) in enumerate(zip(rows, places, strict=True)):
            self.row_images[row].append(place)
            self.pyramids[place] = [m[offset] for m in features.pyramid]
        needed = {image for images in self.row_images for image in images[-keep:]}
        self.pyramids = [p if i in needed else None for i, p in enumerate(self.pyramids)]
        return features

    # ---- for the image decoder

    def image_context(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Projected context of each row's next image [B, longest, D], last token first, and its mask [B, longest]."""
        texts = [self.hidden(row).flip(0) for row in rows]
        context = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = send(torch.tensor([len(t) for t in texts]), self.device)
        mask = (torch.arange(context.shape[1], device=self.device) < lengths[:, None]).long()
        return self.model.project_context(context, mask), mask

    def earlier_images(self, rows: Sequence[int]) -> EarlierImages:
        """The images that condition the next generated image of each of `rows`."""
        keep = self.model.config.image_decoder.previous_images
        seen = [self.row_images[row][-keep:][::-1] for row in rows]
        needed = sorted({image for images in seen for image in images})
        pyramid = self.model.empty_pyramid()
        if needed:
            pyramid = [torch.stack(maps) for maps in zip(*(self.pyramids[i] for i in needed), strict=True)]
        width = max(len(images) for images in seen)
        numbers = [[needed.index(i) for i in images] + [-1] * (width - len(images)) for images in seen]
        images = torch.tensor(numbers, dtype=torch.long, device=self.device).view(len(rows), width)
        return EarlierImages.build(pyramid, images)


def _padded(visible: Sequence[Images], slots: int | None = None) -> Tensor:
    """Lists of images padded with -1: [B, S]."""
    slots = max(map(len, visible), default=0) if slots is None else slots
    rows = [[*images, *[-1] * (slots - len(images))] for images in visible]
    return torch.tensor(rows, dtype=torch.long).view(len(visible), slots)


def _newest_first(images: Tensor) -> Tensor:
    """`images` with all -1 moved to the end: [..., S] to [..., fewest slots that hold them]."""
    order = torch.argsort((images < 0).int(), dim=-1, stable=True)
    images = images.gather(-1, order)
    return images[..., : int((images >= 0).sum(-1).max()) if images.numel() else 0]
