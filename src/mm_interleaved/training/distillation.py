"""Condition distillation: the language model is trained while its conditioning tokens stay the same.

It is used while an image decoder is trained separately on conditioning tokens of the original language model. The
method is "Learning without Forgetting" (Li and Hoiem 2016), applied to the conditioning tokens.

Axes: T target images, D width.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import MMInterleavedModel
from ..model.mm_interleaved import MMInterleavedOutput

_INPUTS = ("input_ids", "attention_mask", "position_ids", "pixel_values", "document_starts", "sample_ids", "layout")


@dataclass
class DistilledOutput(MMInterleavedOutput):
    """The output of a model whose conditioning tokens are distilled.

    Attributes:
        loss_distillation: the weighted distillation loss, part of `loss`; None: the batch has no target image.
    """

    loss_distillation: Tensor | None = None


class ConditionDistillation:
    """Keeps the conditioning tokens of a model close to their present values. It needs a second language model in
    memory.

    Args:
        model: the model, of which a copy without UNet and VAE is made.
        weight: weight of the mean squared error in the loss.
    """

    def __init__(self, model: MMInterleavedModel, weight: float) -> None:
        self.weight = weight
        decoder = model.image_decoder
        left_out = {id(part): nn.Identity() for part in (decoder.unet, decoder.vae)}  # by deepcopy's memo
        self.teacher = deepcopy(model, left_out).requires_grad_(False).eval()

    def add_to(self, output: MMInterleavedOutput, inputs: dict[str, Any], idle: bool = False) -> DistilledOutput:
        """The output of `model(**inputs, return_conditions=True)` with the distillation loss added.

        Args:
            output: its conditions are [T, tokens, D]; without target images its loss does not change.
            inputs: arguments of the model.
            idle: whether the target images were added by `sharding.ForceAllBranches` and have no weight.
        """
        conditions, loss, distillation = output.conditions, output.loss, None
        if conditions is not None and len(conditions):
            teacher = self.teacher.to(conditions.device)
            given = {name: inputs[name] for name in _INPUTS if name in inputs}
            with torch.no_grad():
                wanted = teacher(**given, return_logits=False, return_conditions=True).conditions
            distillation = (0.0 if idle else self.weight) * F.mse_loss(conditions.float(), wanted.float())
            loss = distillation if loss is None else loss + distillation
        return DistilledOutput(**{**output, "loss": loss, "loss_distillation": None if idle else distillation})
