"""Pre-training of a small model's language model on text alone: it learns to write, and what a text asks to draw.

The release starts from a language model that has read a lot, and from an image decoder that drew from texts before; a
small model starts from nothing, and the loss of its images alone teaches it very slowly what a caption means. So
captions of scenes are read here without any image:

    loss = cross-entropy of the next word + loss of the conditions + max(0, -ln spread)

Of the conditions of the image decoder (what `image_decoder.resampler` makes of a text) the n-th has to tell what the
text states of the n-th object that it mentions, and the one after those of the objects which ground they stand on. One
linear layer reads all of them alike, as the attention of the UNet will; it is thrown away. For standardisation and
`spread` see `training.vision`.
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
from .told import GROUND, OBJECTS, TOLD

PARTS = ("language_model", "lm_head", "context_proj", "soi_token", "image_decoder.resampler")


@dataclass
class LanguageOutput(ModelOutput):
    """Losses of a batch and how often the reader of the conditions is right.

    Attributes:
        loss: their sum.
        loss_txt: of the next word, mean over the tokens.
        loss_conditions: of the reader.
        accuracy_kind, accuracy_color, accuracy_cell, accuracy_relation, accuracy_ground: of what texts state.
        spread: of the conditions; see `training.vision`.
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
    """The parts of a model that read and write text, with a reader of the conditions.

    Args:
        config: of the model that they are for.

    Raises:
        ValueError: it has fewer conditions than there is to tell.
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
        self.reader = SharedReader(resampler.hidden_size, {**TOLD, **GROUND})

    def forward(self, input_ids: Tensor, lengths: Tensor, told: Tensor, ground: Tensor) -> LanguageOutput:
        """Losses of writing a text and of telling what it asks to draw.

        Args:
            input_ids: [batch, length], `<s>`, the text and a begin-of-image token, padded on the right.
            lengths: [batch] tokens of each row.
            told: [batch, OBJECTS, len(TOLD)], ground: [batch]; what the texts state, see `training.told`.
        """
        model, (batch, length) = self.model, input_ids.shape
        nothing = torch.empty(batch, length, 0, dtype=torch.long, device=input_ids.device)
        hidden = model.decode(model.embed(input_ids, None), model.no_images(), nothing, None)
        loss_txt = self._next_word(hidden, input_ids, lengths)
        outputs = LanguageOutput(loss_txt=loss_txt)
        rows = torch.arange(batch, device=input_ids.device)
        context, mask = model.image_context(hidden, ImagePositions(rows, lengths - 1, torch.zeros_like(rows)), length)
        conditions = model.image_decoder.resampler(context, mask)
        wanted = torch.full((batch, OBJECTS + 1, len(TOLD) + 1), -100, device=told.device)
        wanted[:, :OBJECTS, :-1], wanted[:, OBJECTS, -1] = told, ground
        loss_conditions, right = self.reader(conditions[:, : OBJECTS + 1], wanted)
        outputs.loss_conditions = loss_conditions
        report(outputs, right)
        outputs.spread = spread(conditions.float())
        outputs.loss = loss_txt + loss_conditions + F.relu(-outputs.spread.log())
        return outputs

    def _next_word(self, hidden: Tensor, input_ids: Tensor, lengths: Tensor) -> Tensor:
        place = torch.arange(input_ids.shape[1] - 1, device=input_ids.device)
        learned = place < lengths[:, None] - 2  # the begin-of-image token is not written by the model
        targets = torch.where(learned, input_ids[:, 1:], -100)
        logits = self.model.lm_head(hidden[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def weights(self) -> dict[str, Tensor]:
        """What `model.weights` of `mmi train` starts from."""
        learned = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        state = self.model.state_dict()
        return {name: state[name] for name in learned}
