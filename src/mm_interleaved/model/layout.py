"""Where the pictures stand in rows of tokens, and who may look at them. Index arithmetic only; no learned part.

A row holds one or more documents, each opened by `<s>`. A picture is one begin-of-image token (SOI) followed by its
visual tokens. Pictures are numbered through the batch in the order of their SOI tokens, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import image_routes
from .mmfs import VisibleImages


@dataclass
class ImagePositions:
    """Where each picture of a batch stands.

    Attributes:
        rows: [pictures] row of its SOI.
        columns: [pictures] column of its SOI.
        starts: [pictures] column where its document starts.
    """

    rows: Tensor
    columns: Tensor
    starts: Tensor

    def __getitem__(self, index: Tensor) -> ImagePositions:
        """The positions of some of the pictures."""
        return ImagePositions(self.rows[index], self.columns[index], self.starts[index])


@dataclass
class Layout:
    """All that follows from the token ids of a batch: integers only.

    Computed on the CPU beside the batch, it lets a training step run on an accelerator without waiting for it.

    Attributes:
        visible: the pictures that each token sees; a group is one token.
        drawn: [drawn pictures] numbers of the pictures that the image loss looks at.
        contexts: where they stand.
        conditioning: numbers of the pictures that condition some drawing; more may follow, see `filled`.
        earlier: those that condition each drawing, as places in `conditioning`; a group is one drawing, all of `drawn`
            once, then again.
        context_length: tokens of the longest context of a drawn picture.
        labelled: [labelled] index into the flattened rows of each token that predicts a labelled one; None: no labels.
        targets: [labelled] the tokens they predict, -100 where nothing is learned after all; None: no labels.
        padded: whether padding must be masked. Rows padded on the right need no mask: no real token comes after it.
    """

    visible: VisibleImages
    drawn: Tensor
    contexts: ImagePositions
    conditioning: Tensor
    earlier: VisibleImages
    context_length: int
    labelled: Tensor | None
    targets: Tensor | None
    padded: bool

    def filled(
        self, pictures: int = 0, visible: int = 0, conditioning: int = 0, context: int = 0, labelled: int = 0
    ) -> Layout:
        """At least of these sizes, for the same results: what is added is seen by nothing and weighs nothing.

        Args:
            pictures: how many pictures there will be, in the routes of `visible`.
            visible: slots for the pictures that a token sees.
            conditioning: pictures in `conditioning`; some stand there again. (Where there are none, none are added.)
            context: `context_length`.
            labelled: entries of `labelled`.
        """
        used = len(self.conditioning)
        count = max(conditioning, used) if used else 0
        places = torch.arange(count, device=self.conditioning.device) % max(used, 1)
        learned = self.labelled, self.targets
        if self.labelled is not None and self.targets is not None:
            more = torch.arange(max(0, labelled - len(self.labelled)), device=self.labelled.device)
            more = more % len(self.visible.images)  # spread: gradients of one and the same entry would queue up
            learned = torch.cat([self.labelled, more]), torch.cat([self.targets, torch.full_like(more, -100)])
        return replace(
            self,
            visible=_widened(self.visible, visible, pictures),
            conditioning=self.conditioning[places],
            earlier=_widened(self.earlier, 0, count),
            context_length=max(context, self.context_length),
            labelled=learned[0],
            targets=learned[1],
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> Layout:
        """The same layout on another device."""
        return _to(self, device, non_blocking)


def _to(value: Any, device: torch.device, non_blocking: bool) -> Any:
    if isinstance(value, Tensor):
        if non_blocking and device.type == "cuda":
            value = value.pin_memory()
        return value.to(device, non_blocking=non_blocking)
    if is_dataclass(value):
        return replace(value, **{f.name: _to(getattr(value, f.name), device, non_blocking) for f in fields(value)})
    return value


def _widened(visible: VisibleImages, slots: int, pictures: int) -> VisibleImages:
    """With at least so many slots, and routes of at least so many pictures."""
    images, routes = visible.images, visible.routes
    wider = max(slots, images.shape[1])
    if routes is not None:
        if images.shape[1]:  # a place in the flattened slots is group * slots + slot
            routes = torch.where(routes < 0, -1, routes // images.shape[1] * wider + routes % images.shape[1])
        routes = torch.nn.functional.pad(routes, (0, 0, 0, max(0, pictures - len(routes))), value=-1)
    images = torch.nn.functional.pad(images, (0, wider - images.shape[1]), value=-1)
    return VisibleImages(images, routes)


def plan(
    input_ids: Tensor,
    attention_mask: Tensor,
    document_starts: Tensor | None,
    *,
    bos_token_id: int,
    soi_token_id: int,
    previous: int,
    labels: Tensor | None = None,
    drawn: Tensor | None = None,
    repeats: int = 1,
    routes: bool = True,
) -> Layout:
    """The layout of a batch.

    Args:
        input_ids: [batch, length].
        attention_mask: [batch, length], 0 at padding.
        document_starts: [pictures]; see `find_images`.
        bos_token_id, soi_token_id: ids of `<s>` and of the begin-of-image token.
        previous: how many earlier pictures a drawing looks at.
        labels: [batch, length], -100 where nothing is learned.
        drawn: numbers of the pictures that the image loss looks at; None: all.
        repeats: how often each of them is drawn.
        routes: whether to sort tokens and drawings by the pictures they see; see `VisibleImages.routes`.

    Raises:
        ValueError: `document_starts` is not one number a picture.
    """
    positions = find_images(input_ids, attention_mask, soi_token_id, document_starts)
    if len(positions.starts) != len(positions.rows):
        raise ValueError(f"document_starts has {len(positions.starts)} entries for {len(positions.rows)} pictures")
    images = visible_images(input_ids, attention_mask, bos_token_id, soi_token_id)
    if drawn is None:
        drawn = torch.arange(len(positions.rows), device=input_ids.device)
    lengths = (positions.columns - positions.starts + 1)[drawn]
    earlier = previous_images(positions, previous)[drawn]
    conditioning = earlier[earlier >= 0].unique()
    places = torch.where(earlier >= 0, torch.searchsorted(conditioning, earlier), -1).repeat(repeats, 1)
    labelled = targets = None
    if labels is not None:
        wanted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        labelled = (wanted != -100).nonzero()[:, 0]
        targets = wanted[labelled]
    return Layout(
        VisibleImages(
            images.flatten(0, 1),
            token_routes(input_ids, attention_mask, images, positions, bos_token_id) if routes else None,
        ),
        drawn,
        positions[drawn],
        conditioning,
        VisibleImages(places, image_routes(places, len(conditioning)) if routes else None),
        int(lengths.max()) if len(lengths) else 0,
        labelled,
        targets,
        padded=not bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()),
    )


def token_routes(
    input_ids: Tensor, attention_mask: Tensor, images: Tensor, positions: ImagePositions, bos_token_id: int
) -> Tensor:
    """`VisibleImages.routes` of `images` [batch, length, slots] from `visible_images`, without sorting.

    The tokens that see a picture are those from its SOI to the end of its document.
    """
    slots, length = images.shape[2], input_ids.shape[1]
    rows, number = positions.rows, torch.arange(len(positions.rows), device=input_ids.device)
    if slots == 0:
        return input_ids.new_zeros(len(rows), 0)
    place = torch.arange(length, device=input_ids.device)
    starts = torch.where(input_ids == bos_token_id, place, length)
    following = starts.flip(1).cummin(1).values.flip(1)  # the next `<s>` at or after each column
    ends = following[rows, positions.columns]
    longest = int((ends - positions.columns).max()) - 1
    columns = positions.columns[:, None] + 1 + torch.arange(longest, device=input_ids.device)
    inside = columns < ends[:, None]
    columns = columns.clamp(max=length - 1)
    inside &= attention_mask[rows[:, None], columns] != 0
    slot = images[rows[:, None], columns, 0] - number[:, None]  # the most recent picture has slot 0
    return torch.where(inside, (rows[:, None] * length + columns) * slots + slot, -1)


def find_images(
    input_ids: Tensor, attention_mask: Tensor, soi_token_id: int, document_starts: Tensor | None
) -> ImagePositions:
    """The pictures of `input_ids` [batch, length].

    Args:
        attention_mask: [batch, length], 0 at padding.
        document_starts: [pictures] column of the `<s>` before each picture; None: the first real column of its row.
    """
    rows, columns = (input_ids == soi_token_id).nonzero(as_tuple=True)
    if document_starts is None:
        document_starts = attention_mask.long().argmax(1)[rows]
    return ImagePositions(rows, columns, document_starts)


def visible_images(input_ids: Tensor, attention_mask: Tensor, bos_token_id: int, soi_token_id: int) -> Tensor:
    """The pictures that each token sees through MMFS: those of its own document that began before it.

    A SOI does not see its own picture; the picture's visual tokens do (spec/model 4.3).

    Returns:
        [batch, length, slots] picture numbers, most recent first, -1 where there is none. `slots` is the largest number
        of pictures that any token sees.
    """
    is_soi = (input_ids == soi_token_id).long()
    before = is_soi.cumsum(1) - is_soi  # pictures of the row that began before this token
    is_bos = input_ids == bos_token_id
    hidden = torch.where(is_bos, before, 0).cummax(1).values  # those of them that belong to earlier documents
    real = attention_mask.bool()
    count = torch.where(real, before - hidden, 0)
    per_row = is_soi.sum(1)
    last = (per_row.cumsum(0) - per_row)[:, None] + before - 1
    slots = int(count.max()) if count.numel() else 0
    offset = torch.arange(slots, device=input_ids.device)
    return torch.where(offset < count[..., None], last[..., None] - offset, -1)


def previous_images(positions: ImagePositions, width: int) -> Tensor:
    """The pictures that condition the drawing of each picture: up to `width` of those just before it.

    They must lie in the same row and their SOI at or after the picture's document start (spec/model 5.2; the release
    has width 1).

    Returns:
        [pictures, slots] picture numbers, most recent first, -1 where there is none; slots <= width.
    """
    rows, columns, starts = positions.rows, positions.columns, positions.starts
    number = torch.arange(len(rows), device=rows.device)
    candidate = number[:, None] - 1 - torch.arange(width, device=rows.device)
    other = candidate.clamp(min=0)
    allowed = (candidate >= 0) & (rows[other] == rows[:, None]) & (columns[other] >= starts[:, None])
    images = torch.where(allowed, candidate, -1)
    slots = int(allowed.sum(1).max()) if len(rows) else 0
    return images[:, :slots]


def reversed_context(hidden: Tensor, positions: ImagePositions, longest: int | None = None) -> tuple[Tensor, Tensor]:
    """The tokens of each picture's document up to its SOI, last one first.

    Args:
        hidden: [batch, length, width].
        positions: the pictures.
        longest: length of the longest context, if it is known.

    Returns:
        Context [pictures, longest, width], padded with whatever, and its mask
        [pictures, longest], 1 on real entries.
    """
    lengths = positions.columns - positions.starts + 1
    if longest is None:
        longest = int(lengths.max()) if len(lengths) else 0
    steps = torch.arange(longest, device=hidden.device)
    mask = (steps < lengths[:, None]).long()
    # Padding wraps around instead of gathering in column 0, where adding up its (zero) gradients would take long.
    columns = (positions.columns[:, None] - steps) % hidden.shape[1]
    return hidden[positions.rows[:, None], columns], mask


def document_mask(input_ids: Tensor, attention_mask: Tensor, bos_token_id: int, dtype: torch.dtype) -> Tensor:
    """Additive causal mask [batch, 1, length, length] that keeps the documents of a packed row apart."""
    length = input_ids.shape[1]
    document = (input_ids == bos_token_id).cumsum(1)
    causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
    same = document[:, :, None] == document[:, None, :]
    allowed = causal & same & attention_mask.bool()[:, None, :]
    allowed |= torch.eye(length, dtype=torch.bool, device=input_ids.device)  # padding attends to itself
    return torch.zeros(allowed.shape, dtype=dtype, device=input_ids.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )[:, None]
