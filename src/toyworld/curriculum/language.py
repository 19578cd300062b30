"""Pre-training of the language model of a small model, on text alone.

The release starts from a trained language model and from an image decoder that is conditioned on text. A small model
starts from nothing, and its image loss alone teaches it very slowly what a caption means. So this task reads captions
of scenes, without images:

    loss = cross-entropy of the next token + loss of a linear probe on the conditioning tokens + max(0, -ln spread)

The conditioning tokens are the outputs of `image_decoder.resampler` for a text. From the n-th of them, the probe
predicts what the text states of the n-th object that it mentions; from the one after the objects, the ground. One
linear layer serves all tokens, since the attention of the UNet treats all of them alike, too. It is not kept.
`curriculum.vision` describes standardisation and `spread`.

Axes: B batch, L tokens, O objects (`OBJECTS`), F facts of an object (`len(STATED)`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from mm_interleaved.model import MMInterleavedConfig, MMInterleavedModel
from mm_interleaved.model.layout import ImagePositions

from .parts import SharedReader, report, spread
from .stated import GROUND, OBJECTS, STATED

PARTS = ("language_model", "lm_head", "context_proj", "soi_token", "image_decoder.resampler")


@dataclass
class LanguageOutput(ModelOutput):
    """Losses of a batch and the accuracy of the probe on the conditioning tokens.

    Attributes:
        loss: their sum.
        loss_txt: of the next token, mean over the tokens.
        loss_conditions: of the probe.
        accuracy_kind, accuracy_color, accuracy_cell, accuracy_relation, accuracy_ground: of what texts state.
        spread: of the conditioning tokens; see `curriculum.vision`.
    """

    loss: Tensor | None = None
    loss_txt: Tensor | None = None
    loss_conditions: Tensor | None = None
    accuracy_kind: Tensor | None = None
    accuracy_color: Tensor | None = None
    accuracy_cell: Tensor | None = None
    accuracy_relation: Tensor | None = None
    accuracy_ground: Tensor | None = None
    spread: Tensor | None = None


class LanguageTask(nn.Module):
    """The parts of a model that process text, with a probe on the conditioning tokens.

    Args:
        config: of the model that they are for.

    Raises:
        ValueError: it has fewer conditioning tokens than the probe needs.
    """

    def __init__(self, config: MMInterleavedConfig) -> None:
        super().__init__()
        resampler = config.image_decoder.resampler
        if resampler.num_queries <= OBJECTS:
            raise ValueError(f"image_decoder.resampler.num_queries must be at least {OBJECTS + 1}, one for each object "
                             "of a scene and one for the ground")  # fmt: skip
        self.model = MMInterleavedModel(config)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith(PARTS) and ".synchronizer." not in name)
        self.reader = SharedReader(resampler.hidden_size, {**STATED, **GROUND})

    def forward(self, input_ids: Tensor, lengths: Tensor, stated: Tensor, ground: Tensor) -> LanguageOutput:
        """Return the losses of predicting texts, and what they state from the conditioning tokens.

        Args:
            input_ids: [B, L], `<s>`, the text and a begin-of-image token, padded on the right.
            lengths: [B], tokens of each row.
            stated: [B, O, F], what the texts state about objects (`curriculum.stated`).
            ground: [B], what they state about the ground.
        """
        model, (batch, length) = self.model, input_ids.shape
        nothing = torch.empty(batch, length, 0, dtype=torch.long, device=input_ids.device)
        hidden = model.decode(model.embed(input_ids, None), model.no_images(), nothing, None)
        loss_txt = self._next_word(hidden, input_ids, lengths)
        outputs = LanguageOutput(loss_txt=loss_txt)
        rows = torch.arange(batch, device=input_ids.device)
        context, mask = model.image_context(hidden, ImagePositions(rows, lengths - 1, torch.zeros_like(rows)), length)
        conditions = model.image_decoder.resampler(context, mask)
        wanted = torch.full((batch, OBJECTS + 1, len(STATED) + 1), -100, device=stated.device)
        wanted[:, :OBJECTS, :-1], wanted[:, OBJECTS, -1] = stated, ground
        loss_conditions, right = self.reader(conditions[:, : OBJECTS + 1], wanted)
        outputs.loss_conditions = loss_conditions
        report(outputs, right)
        outputs.spread = spread(conditions.float())
        outputs.loss = loss_txt + loss_conditions + F.relu(-outputs.spread.log())
        return outputs

    def _next_word(self, hidden: Tensor, input_ids: Tensor, lengths: Tensor) -> Tensor:
        place = torch.arange(input_ids.shape[1] - 1, device=input_ids.device)
        learned = place < lengths[:, None] - 2  # the model does not learn to predict the begin-of-image token
        targets = torch.where(learned, input_ids[:, 1:], -100)
        logits = self.model.lm_head(hidden[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def weights(self) -> dict[str, Tensor]:
        """What `model.weights` of `mmi train` starts from."""
        learned = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        state = self.model.state_dict()
        return {name: state[name] for name in learned}
