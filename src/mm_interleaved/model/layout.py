"""The places of images in rows of tokens, and the visible images of each token: integer arithmetic, nothing learned.

A row holds one or more documents, each starting with `<s>`. An image is one begin-of-image token (SOI) followed by its
image tokens. Images are numbered through the batch in the order of their SOI tokens, row by row. The rules are in
docs/model.md, "Visible images" and "Earlier images of the UNet".

Axes: B rows of the batch, L tokens of a row, I images of the batch, T target images of the image loss, K slots for the
visible images of a token or target image (most recent first, -1 = none), D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import image_routes
from .mmfs import VisibleImages


@dataclass
class ImagePositions:
    """The places of some images.

    Attributes:
        rows: [I] row of the SOI.
        columns: [I] column of the SOI.
        starts: [I] column where the document of the image starts.
    """

    rows: Tensor
    columns: Tensor
    starts: Tensor

    def __getitem__(self, index: Tensor) -> ImagePositions:
        """The positions of some of the images."""
        return ImagePositions(self.rows[index], self.columns[index], self.starts[index])

    @property
    def lengths(self) -> Tensor:
        """[I] number of tokens in each image's context: its document up to and including its SOI."""
        return self.columns - self.starts + 1


@dataclass
class Layout:
    """The integers that follow from the token ids of a batch.

    They are computed on the CPU with the batch, so that a training step needs no synchronisation with the device.

    Attributes:
        visible: the visible images of each token; a group is one token.
        target_images: [T] numbers of the images of the image loss.
        target_positions: their places.
        conditioning_images: numbers of the images that condition some target image; more may follow, see `filled`.
        earlier: the images that condition each target image, as indices into `conditioning_images`; a group is one
            target image; all of `target_images` once, then again for every further noise sample.
        context_length: tokens of the longest context of a target image.
        label_positions: [labels] index into the flattened rows of each token that predicts a label; None: no labels.
        label_ids: [labels] the tokens to predict, -100 for entries without a loss; None: no labels.
        padded: whether padding must be masked. Rows padded on the right need no mask: no real token follows padding.
    """

    visible: VisibleImages
    target_images: Tensor
    target_positions: ImagePositions
    conditioning_images: Tensor
    earlier: VisibleImages
    context_length: int
    label_positions: Tensor | None
    label_ids: Tensor | None
    padded: bool

    @property
    def num_labels(self) -> int:
        """The number of tokens to predict."""
        return 0 if self.label_ids is None else int((self.label_ids != -100).sum())

    def filled(
        self, images: int = 0, visible: int = 0, conditioning_images: int = 0, context: int = 0, labels: int = 0
    ) -> Layout:
        """The layout padded to at least these sizes. Results are the same: added entries are invisible or have weight
        0.

        Args:
            images: number of images in the routes of `visible`.
            visible: slots for the visible images of a token.
            conditioning_images: entries of `conditioning_images`; some are repeated. (If there are none, none are
                added.)
            context: `context_length`.
            labels: entries of `label_positions`.
        """
        used = len(self.conditioning_images)
        count = max(conditioning_images, used) if used else 0
        places = torch.arange(count, device=self.conditioning_images.device) % max(used, 1)
        positions, ids = self.label_positions, self.label_ids
        if positions is not None and ids is not None:
            more = torch.arange(max(0, labels - len(positions)), device=positions.device)
            more = more % len(self.visible.images)  # spread, because gradients of one entry are added up serially
            positions, ids = torch.cat([positions, more]), torch.cat([ids, torch.full_like(more, -100)])
        return replace(
            self,
            visible=_widened(self.visible, visible, images),
            conditioning_images=self.conditioning_images[places],
            earlier=_widened(self.earlier, 0, count),
            context_length=max(context, self.context_length),
            label_positions=positions,
            label_ids=ids,
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> Layout:
        """The same layout on another device."""
        return _to(self, device, non_blocking)


def _to(value: Any, device: torch.device, non_blocking: bool) -> Any:
    if isinstance(value, Tensor):
        if non_blocking and device.type == "cuda":
            value = value.pin_memory()
        return value.to(device, non_blocking=non_blocking)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _to(getattr(value, f.name), device, non_blocking) for f in fields(value)})
    return value


def _widened(visible: VisibleImages, slots: int, images: int) -> VisibleImages:
    """`visible` with at least so many slots, and routes of at least so many images."""
    numbers, routes = visible.images, visible.routes
    wider = max(slots, numbers.shape[1])
    if routes is not None:
        if numbers.shape[1]:  # a position in the flattened slots is group * slots + slot
            routes = torch.where(routes < 0, -1, routes // numbers.shape[1] * wider + routes % numbers.shape[1])
        routes = F.pad(routes, (0, 0, 0, max(0, images - len(routes))), value=-1)
    return VisibleImages(F.pad(numbers, (0, wider - numbers.shape[1]), value=-1), routes)


def plan(
    input_ids: Tensor,
    attention_mask: Tensor,
    document_starts: Tensor | None,
    *,
    bos_token_id: int,
    soi_token_id: int,
    previous: int,
    labels: Tensor | None = None,
    target_images: Tensor | None = None,
    repeats: int = 1,
    routes: bool = True,
    sample_ids: Tensor | None = None,
) -> Layout:
    """The layout of a batch.

    Args:
        input_ids: [B, L].
        attention_mask: [B, L], 0 at padding.
        document_starts: [I]; see `find_images`.
        bos_token_id, soi_token_id: ids of `<s>` and of the begin-of-image token.
        previous: number of earlier images that condition a target image.
        labels: [B, L], -100 where nothing is learned.
        target_images: [T] numbers of the images of the image loss; None: all.
        repeats: noise samples of each of them.
        routes: whether to sort tokens and target images by their visible images; see `VisibleImages.routes`.
        sample_ids: [B, L] number of each token's sample, -1 at padding; a document ends with its sample. None: a row is
            a sample.

    Raises:
        ValueError: `document_starts` does not have one number for each image.
    """
    positions = find_images(input_ids, attention_mask, soi_token_id, document_starts, sample_ids)
    if len(positions.starts) != len(positions.rows):
        raise ValueError(f"document_starts has {len(positions.starts)} entries for {len(positions.rows)} images")
    images = visible_images(input_ids, attention_mask, bos_token_id, soi_token_id, sample_ids)
    if target_images is None:
        target_images = torch.arange(len(positions.rows), device=input_ids.device)
    targets = positions[target_images]
    conditioning, earlier = _conditioning(previous_images(positions, previous)[target_images], repeats, routes)
    if labels is not None and sample_ids is not None:  # no token predicts the first one of another sample
        labels = labels.masked_fill(sample_starts(sample_ids), -100)
    label_positions, label_ids = _label_targets(labels)
    visible = VisibleImages(
        images.flatten(0, 1),
        token_routes(input_ids, attention_mask, images, positions, bos_token_id, sample_ids) if routes else None,
    )
    return Layout(
        visible=visible,
        target_images=target_images,
        target_positions=targets,
        conditioning_images=conditioning,
        earlier=earlier,
        context_length=int(targets.lengths.max()) if len(target_images) else 0,
        label_positions=label_positions,
        label_ids=label_ids,
        padded=not bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()),
    )


def _conditioning(earlier: Tensor, repeats: int, routes: bool) -> tuple[Tensor, VisibleImages]:
    """`Layout.conditioning_images` and `Layout.earlier` of `earlier` [T, K] image numbers."""
    images = earlier[earlier >= 0].unique()
    places = torch.where(earlier >= 0, torch.searchsorted(images, earlier), -1).repeat(repeats, 1)
    return images, VisibleImages(places, image_routes(places, len(images)) if routes else None)


def _label_targets(labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`Layout.label_positions` and `Layout.label_ids` of `labels` [B, L]: the token before a label predicts it."""
    if labels is None:
        return None, None
    wanted = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    positions = (wanted != -100).nonzero()[:, 0]
    return positions, wanted[positions]


def sample_starts(sample_ids: Tensor) -> Tensor:
    """[B, L] whether a sample, or a row, starts at the token; `sample_ids` is [B, L]."""
    return F.pad(sample_ids[:, 1:] != sample_ids[:, :-1], (1, 0), value=True)


def sample_positions(sample_ids: Tensor) -> Tensor:
    """[B, L] position of each token in its sample; `sample_ids` is [B, L]."""
    column = torch.arange(sample_ids.shape[1], device=sample_ids.device)
    return column - torch.where(sample_starts(sample_ids), column, 0).cummax(1).values


def starts_of_blocks(input_ids: Tensor, bos_token_id: int | None, sample_ids: Tensor | None) -> Tensor:
    """[B, L] whether a token is the first of a sample, or is a `<s>`, where a document starts.

    Args:
        input_ids: [B, L].
        bos_token_id: id of `<s>`; None: only samples count.
        sample_ids: [B, L] number of each token's sample; None: a row is a sample.
    """
    starts = torch.zeros_like(input_ids, dtype=torch.bool) if bos_token_id is None else input_ids == bos_token_id
    return starts if sample_ids is None else starts | sample_starts(sample_ids)


def token_routes(
    input_ids: Tensor,
    attention_mask: Tensor,
    images: Tensor,
    positions: ImagePositions,
    bos_token_id: int,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """`VisibleImages.routes` of `images` [B, L, K] from `visible_images`, without sorting.

    An image is visible to the tokens after its SOI up to the end of its document.
    """
    slots, length, device = images.shape[2], input_ids.shape[1], input_ids.device
    rows, number = positions.rows, torch.arange(len(positions.rows), device=device)
    if slots == 0:
        return rows.new_zeros(len(rows), 0)
    place = torch.arange(length, device=device)
    starts = starts_of_blocks(input_ids, bos_token_id, sample_ids)
    following = torch.where(starts, place, length).flip(1).cummin(1).values.flip(1)  # the next start, from each column
    ends = following[rows, positions.columns]
    longest = int((ends - positions.columns).max()) - 1
    columns = positions.columns[:, None] + 1 + torch.arange(longest, device=device)
    inside = columns < ends[:, None]
    columns = columns.clamp(max=length - 1)
    inside &= attention_mask[rows[:, None], columns] != 0
    slot = images[rows[:, None], columns, 0] - number[:, None]  # the most recent image has slot 0
    return torch.where(inside, (rows[:, None] * length + columns) * slots + slot, -1)


def find_images(
    input_ids: Tensor,
    attention_mask: Tensor,
    soi_token_id: int,
    document_starts: Tensor | None,
    sample_ids: Tensor | None = None,
) -> ImagePositions:
    """The images of `input_ids` [B, L].

    Args:
        input_ids: [B, L].
        attention_mask: [B, L], 0 at padding.
        soi_token_id: id of the begin-of-image token.
        document_starts: [I] column of the `<s>` before each image; None: the first real column of its row or sample.
        sample_ids: [B, L] number of each token's sample; None: a row is a sample.
    """
    rows, columns = (input_ids == soi_token_id).nonzero(as_tuple=True)
    if document_starts is None:
        document_starts = attention_mask.long().argmax(1)[rows]
    if sample_ids is not None:
        own = columns - sample_positions(sample_ids)[rows, columns]
        document_starts = torch.maximum(document_starts, own)
    return ImagePositions(rows, columns, document_starts)


def visible_images(
    input_ids: Tensor,
    attention_mask: Tensor,
    bos_token_id: int,
    soi_token_id: int,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """The visible images of each token, for MMFS: those of its document whose SOI precedes it.

    An image is visible to its own image tokens, but not to its SOI. A document ends with its sample.

    Returns:
        [B, L, K] image numbers, most recent first, -1 where there is none. K is the largest number of visible images.
    """
    is_soi = (input_ids == soi_token_id).long()
    before = is_soi.cumsum(1) - is_soi  # images of the row that began before this token
    starts = starts_of_blocks(input_ids, bos_token_id, sample_ids)
    hidden = torch.where(starts, before, 0).cummax(1).values  # those of them that belong to earlier documents
    real = attention_mask.bool()
    count = torch.where(real, before - hidden, 0)
    per_row = is_soi.sum(1)
    last = (per_row.cumsum(0) - per_row)[:, None] + before - 1
    slots = int(count.max()) if count.numel() else 0
    offset = torch.arange(slots, device=input_ids.device)
    return torch.where(offset < count[..., None], last[..., None] - offset, -1)


def previous_images(positions: ImagePositions, width: int) -> Tensor:
    """The images that condition the image decoder for each image: up to `width` of those just before it.

    They must be in the same row, and their SOI at or after the image's document start. The release has width 1.

    Returns:
        [I, K] image numbers, most recent first, -1 where there is none; K <= width.
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
    """The hidden states of each image's document up to its SOI, last one first.

    Args:
        hidden: [B, L, D].
        positions: of I images.
        longest: length of the longest context, if it is known.

    Returns:
        Context [I, longest, D], with arbitrary values at padding, and its mask [I, longest], 1 on real entries.
    """
    lengths = positions.lengths
    if longest is None:
        longest = int(lengths.max()) if len(lengths) else 0
    steps = torch.arange(longest, device=hidden.device)
    mask = (steps < lengths[:, None]).long()
    # Padding wraps around instead of reading column 0 only, where adding up its zero gradients would be slow.
    columns = (positions.columns[:, None] - steps) % hidden.shape[1]
    return hidden[positions.rows[:, None], columns], mask


def block_mask(starts: Tensor, attention_mask: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Additive causal mask [B, 1, L, L] for rows of blocks whose tokens attend to their own block only.

    Args:
        starts: [B, L] whether a block starts at the token.
        attention_mask: [B, L], 0 at padding.
        dtype: type of the mask.
        window: number of columns that a token attends to, with its own; None: all before it.
    """
    length, block = starts.shape[1], starts.cumsum(1)
    near = torch.ones(length, length, dtype=torch.bool, device=starts.device).tril()
    if window is not None:
        near = near.triu(1 - window)
    same = block[:, :, None] == block[:, None, :]
    allowed = near & same & attention_mask.bool()[:, None, :]
    allowed |= torch.eye(length, dtype=torch.bool, device=starts.device)  # padding attends to itself
    return torch.zeros(allowed.shape, dtype=dtype, device=starts.device).masked_fill(~allowed, torch.finfo(dtype).min)[
        :, None
    ]
