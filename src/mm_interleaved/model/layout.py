"""Where the pictures stand in rows of tokens, and who may look at them. Index arithmetic only; no learned part.

A row holds one or more documents, each opened by `<s>`. A picture is one begin-of-image token (SOI) followed by its
visual tokens. Pictures are numbered through the batch in the order of their SOI tokens, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def reversed_context(hidden: Tensor, positions: ImagePositions) -> tuple[Tensor, Tensor]:
    """The tokens of each picture's document up to its SOI, last one first.

    Args:
        hidden: [batch, length, width].

    Returns:
        Context [pictures, longest, width], padded with whatever stands at the row's start, and its mask
        [pictures, longest], 1 on real entries.
    """
    lengths = positions.columns - positions.starts + 1
    steps = torch.arange(int(lengths.max()) if len(lengths) else 0, device=hidden.device)
    mask = (steps < lengths[:, None]).long()
    columns = (positions.columns[:, None] - steps).clamp(min=0)
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
