"""The batch class of all tasks, and the rule that decides which tokens are learned.

Axes: B rows of the batch, L tokens of a row, I images of the batch, h and w height and width of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import BatchFeature

from ..document import Box


class Batch(BatchFeature):
    """Rows of text and images as a dictionary of tensors; `model(**batch)` takes all of it.

    Like every `BatchFeature` it is made from its items (`Batch(**batch)`, `Batch({**batch})`), its keys are also
    attributes, and `to(device, dtype)` changes it in place and casts floating-point tensors only. A missing key raises;
    use `batch.get(key)` for optional ones.

    Images are numbered through the batch, row by row, in the order of their begin-of-image tokens.

    Keys:
        input_ids: [B, L] int64.
        attention_mask: [B, L] int64, 1 = real, 0 = padding.
        position_ids: [B, L] int64, number of real tokens before this one, in its sample if there are `sample_ids`.
        pixel_values: [I, 3, h, w] float32 in [0, 1], or uint8 in [0, 255] from loaders.
        image_rows: [I] int64, the row of each image.
        document_starts: [I] int64, column of the `<s>` that starts each image's document.
        sample_ids: [B, L] int64, number of each token's sample in its row, -1 at padding; only where a row has several
            samples that attend to themselves only.

    Keys of training batches:
        labels: [B, L] int64, the token to learn at each position or -100.
        target_pixel_values: [I, 3, h, w] as `pixel_values`, the targets of the image decoder.
        image_loss_mask: [I] float32, 1 for images that are learned.
        loss_text_weight, loss_image_weight: floats, weights that replace the configuration's.

    Attributes:
        source: name of the data source of the rows, for reports; not part of the dictionary. None: unknown.
        boxes: of each image the boxes in it, with their numbers in the document, for reports; not part of the
            dictionary. Empty: unknown.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    image_rows: Tensor
    document_starts: Tensor
    sample_ids: Tensor
    labels: Tensor
    target_pixel_values: Tensor
    image_loss_mask: Tensor
    source: str | None = None
    boxes: Sequence[Sequence[tuple[int, Box]]] = ()

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        tensor_type: str | None = None,
        *,
        source: str | None = None,
        boxes: Sequence[Sequence[tuple[int, Box]]] = (),
        **items: Any,
    ) -> None:
        super().__init__({**(data or {}), **items}, tensor_type)
        self.source, self.boxes = source, boxes

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute that is not a key: `batch.labels = x` would not reach the model.

        Raises:
            AttributeError: `name` is a key of batches.
        """
        if name in _KEYS:
            raise AttributeError(f"set the item of the batch, batch['{name}'] = ..., instead of the attribute '{name}'")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "source": self.source, "boxes": self.boxes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    if TYPE_CHECKING:

        def to(self, *args: Any, **kwargs: Any) -> Self: ...

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU are fast."""
        pinned = {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in self.items()}
        return Batch(pinned, source=self.source, boxes=self.boxes)


_KEYS = frozenset(Batch.__annotations__) - {"source", "boxes"}


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
    """The token to learn at each position (docs/model.md, "Text labels").

    Not learned are padding, image tokens, `<s>`, a begin-of-image token right after `<s>`, tokens that `learned`
    excludes and, with `ignore_text_before_image`, all text of a document before its first begin-of-image token.

    Args:
        input_ids: [B, L].
        attention_mask: [B, L], 0 at padding.
        bos_token_id: id of `<s>`.
        soi_token_id: id of the begin-of-image token.
        image_token_id: id of the image token.
        learned: [B, L] bool; None: all True.
        ignore_text_before_image: one value for all rows, or [B] bool.

    Returns:
        [B, L]: the ids, -100 where nothing is learned.
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
