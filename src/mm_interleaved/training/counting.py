"""transformers' Trainer for batches with different numbers of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer


class CountingTrainer(Trainer):
    """The stock Trainer, which also counts the target images of an optimizer step.

    Both losses are then means over all micro-batches of a step on all processes. The stock Trainer counts labels only,
    and the image loss of a micro-batch is weighted by its share of the labels (see `MMInterleavedModel`).
    """

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of a step, each with the number of target images of all of them."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(_target_images(sample) for sample in samples)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = cast(Tensor, self.accelerator.gather(torch.tensor([count], device=device)))
            count = int(counts.sum())
        for sample in samples:
            sample["num_images_in_batch"] = count
        return samples, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss; outside of training the images of the batch itself are counted."""
        inputs = {"num_images_in_batch": _target_images(inputs), **inputs}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def _target_images(batch: Any) -> int:
    targets = batch.get("target_pixel_values")
    return 0 if targets is None else len(targets)
