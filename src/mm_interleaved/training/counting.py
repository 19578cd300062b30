"""Losses as means over an optimizer step: over all its micro-batches and processes together.

A process knows how many labels and target images each of its micro-batches has. Their sums over the step are what the
model divides by (`num_items_in_batch`, `num_images_in_batch`), so that a step gives the same gradients however its rows
are divided into micro-batches and over processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..model import MMInterleavedConfig
from ..model.layout import find_images


@dataclass(frozen=True)
class LossCounts:
    """The numbers of items that the losses of a batch are sums over.

    Attributes:
        labels: tokens to learn; 0 if the batch has no text loss.
        images: target images, by weight; 0 if the batch has no image loss.
    """

    labels: int
    images: float


def image_weights(batch: Any, config: MMInterleavedConfig) -> Tensor:
    """[I] weights of the images of a batch in the image loss; 0 for those without a context (docs/model.md)."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    found = find_images(ids, mask, config.soi_token_id, batch.get("document_starts"), batch.get("sample_ids"))
    own = batch.get("image_loss_mask")
    weights = torch.ones(len(found.rows), device=ids.device) if own is None else own
    return weights * (found.lengths > 2)


def count_losses(batch: Any, config: MMInterleavedConfig) -> LossCounts:
    """The counts of a batch of the processor, of which `forward` takes all images as targets.

    Images without a weight count unless the model normalises the image loss, as in its mean over a batch.
    """
    labels, targets = batch.get("labels"), batch.get("target_pixel_values")
    tokens = 0 if labels is None else int((labels[:, 1:] != -100).sum())
    images = 0.0
    if targets is not None:
        images = float(image_weights(batch, config).sum()) if config.normalize_image_loss else float(len(targets))
    return weighed(LossCounts(tokens, images), batch, config)


def weighed(counts: LossCounts, batch: Any, config: MMInterleavedConfig) -> LossCounts:
    """The counts without those of losses that have no weight in this batch."""
    text, image = (batch.get(name) for name in ("loss_text_weight", "loss_image_weight"))
    text = config.loss_text_weight if text is None else text
    image = config.loss_image_weight if image is None else image
    return LossCounts(counts.labels if text else 0, counts.images if image else 0.0)


class CountingTrainer(Trainer):
    """The stock Trainer, whose losses are means over all micro-batches of a step on all processes.

    The stock Trainer counts labels only, and weighs the image loss of a micro-batch by its share of the labels (see
    `MMInterleavedModel`).
    """

    def count(self, batch: Any) -> LossCounts:
        """The counts of a batch."""
        assert self.model is not None
        return count_losses(batch, cast(MMInterleavedConfig, self.model.config))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of a step, each with the number of target images of all of them; and that of labels."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        labels, images = self.totals([self.count(sample) for sample in samples], device)
        for sample in samples:
            sample["num_images_in_batch"] = images
        return samples, labels

    def totals(self, counts: Sequence[LossCounts], device: torch.device) -> Tensor:
        """[2] the numbers of labels and images of all micro-batches, on all processes if losses are averaged so."""
        sums = [float(sum(c.labels for c in counts)), float(sum(c.images for c in counts))]
        own = torch.tensor([sums], device=device)
        across = self.args.average_tokens_across_devices and self.args.world_size > 1
        return cast(Tensor, self.accelerator.gather(own)).sum(0) if across else own[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss; outside of training the images of the batch itself are counted."""
        if "num_images_in_batch" not in inputs:
            inputs = {**inputs, "num_images_in_batch": self.count(inputs).images}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
