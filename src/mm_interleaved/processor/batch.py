"""One batch for every task, and the rule that says which tokens are learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_NOT_TENSORS = ("source", "loss_text_weight", "loss_image_weight")


@dataclass
class Batch(Mapping[str, Tensor]):
    """Tensors of some rows of text and pictures; `model(**batch)` takes them.

    Pictures are numbered through the batch, row by row, in the order of their begin-of-image tokens.

    Attributes:
        input_ids: [batch, length] int64.
        attention_mask: [batch, length] int64, 1 = real, 0 = padding.
        position_ids: [batch, length] int64, real tokens before this one.
        pixel_values: [pictures, 3, image_size, image_size] float32 in [0, 1], or uint8 in [0, 255] from loaders.
        image_rows: [pictures] int64, the row of each picture.
        document_starts: [pictures] int64, column of the `<s>` that opens each picture's document.
        labels: [batch, length] int64, the token to learn at each position or -100; None for generation.
        target_pixel_values: [pictures, 3, target_size, target_size] likewise, what to draw; None as for labels.
        image_loss_mask: [pictures] float32, 1 where the picture is to be learned; None as for labels.
        source: name of the data source that the rows come from, if it is known. This and the weights are not tensors,
            and not part of the mapping.
        loss_text_weight: of this batch, instead of the trainer's; None: as the trainer says.
        loss_image_weight: likewise.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    image_rows: Tensor
    document_starts: Tensor
    labels: Tensor | None = None
    target_pixel_values: Tensor | None = None
    image_loss_mask: Tensor | None = None
    source: str | None = None
    loss_text_weight: float | None = None
    loss_image_weight: float | None = None

    def __getitem__(self, key: str) -> Tensor:
        value = getattr(self, key, None) if key in self._names() else None
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names() if getattr(self, name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @classmethod
    def _names(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls) if f.name not in _NOT_TENSORS]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return dataclasses.replace(self, **{name: self[name].to(device, non_blocking=True) for name in self})

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU are fast."""
        return dataclasses.replace(self, **{name: self[name].pin_memory() for name in self})


def build_labels(
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    bos_token_id: int,
    soi_token_id: int,
    image_token_id: int,
    learned: Tensor | None = None,
    ignore_text_before_image: Tensor | bool = False,
) -> Tensor:
    """Which token is to be learned at each position (spec/model 7.1).

    Not learned are padding, image tokens, `<s>`, a begin-of-image right after `<s>`, what `learned` excludes and, where
    `ignore_text_before_image` holds, all text of a document before its first begin-of-image.

    Args:
        input_ids: [batch, length].
        attention_mask: [batch, length], 0 at padding.
        bos_token_id: id of `<s>`.
        soi_token_id: id of the begin-of-image token.
        image_token_id: id of the image token.
        learned: [batch, length] bool; None: everything.
        ignore_text_before_image: for all rows, or [batch] bool.

    Returns:
        [batch, length]: the ids, -100 where nothing is learned.
    """
    is_bos, is_soi = input_ids == bos_token_id, input_ids == soi_token_id
    after_bos = torch.cat([torch.zeros_like(is_bos[:, :1]), is_bos[:, :-1]], dim=1)
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    last_soi = torch.where(is_soi, column, -1).cummax(1).values
    last_bos = torch.where(is_bos, column, -1).cummax(1).values
    before_image = (last_soi < last_bos) | (last_soi < 0)
    rows = torch.as_tensor(ignore_text_before_image, device=input_ids.device).expand(len(input_ids))
    skip = (attention_mask == 0) | (input_ids == image_token_id) | is_bos | (after_bos & is_soi)
    skip |= before_image & rows[:, None]
    if learned is not None:
        skip |= ~learned
    return input_ids.masked_fill(skip, -100)
