"""Pre-training of a small model's language model on text alone: it learns to write, and what a text asks to draw.

The release starts from a language model that has read a lot, and from an image decoder that drew from texts before; a
small model starts from nothing, and the loss of its pictures alone teaches it very slowly what a caption means. So
captions of scenes are read here without any picture:

    loss = cross-entropy of the next word + loss of the conditions + max(0, -ln spread)

The conditions of the image decoder (what `image_decoder.resampler` makes of a text) are read by one linear layer,
which has to tell for every kind of thing whether the text has one, and its traits and cell. The reader is thrown away.
What a text leaves open stays a guess. For standardisation and `spread` see `training.vision`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from ..model import MMInterleavedConfig, MMInterleavedModel
from ..model.layout import ImagePositions
from ..toyworld.reader import TRAITS
from ..toyworld.scene import GRID
from .parts import cell_of, spread

WEIGHTS = "language.safetensors"
PARTS = ("language_model", "lm_head", "context_proj", "soi_token", "image_decoder.resampler")
KINDS = len(TRAITS["kind"])
TOLD = {**{name: len(values) for name, values in TRAITS.items() if name != "kind"}, "cell": GRID * GRID}
"""What is told of each kind of thing that there is, and in how many forms it comes."""


@dataclass
class LanguageOutput(ModelOutput):
    """Losses of a batch and how often the reader of the conditions is right.

    Attributes:
        loss: their sum.
        loss_txt: of the next word, mean over the tokens.
        loss_conditions: of the reader.
        accuracy_kind: of the kinds that a text has or is thought to have, the share that is both.
        accuracy_color, accuracy_cell: of the things, whatever their texts tell of them.
        spread: of the conditions; see `training.vision`.
    """

    loss: Tensor | None = None
    loss_txt: Tensor | None = None
    loss_conditions: Tensor | None = None
    accuracy_kind: Tensor | None = None
    accuracy_color: Tensor | None = None
    accuracy_cell: Tensor | None = None
    spread: Tensor | None = None


class LanguageTask(nn.Module):
    """The parts of a model that read and write text, with a reader of the conditions.

    Args:
        config: of the model that they are for.
    """

    def __init__(self, config: MMInterleavedConfig) -> None:
        super().__init__()
        self.model = MMInterleavedModel(config)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith(PARTS) and ".synchronizer." not in name)
        told = config.image_decoder.resampler.num_queries * config.image_decoder.resampler.hidden_size
        self.standard = nn.BatchNorm1d(told, affine=False)
        self.reader = nn.Linear(told, KINDS * (1 + sum(TOLD.values())))
        with torch.no_grad():  # most kinds are in no text; without this the first steps only learn that
            self.reader.bias.view(KINDS, -1)[:, 0] = -3.0

    def forward(self, input_ids: Tensor, lengths: Tensor, geometry: Tensor, traits: Tensor) -> LanguageOutput:
        """Losses of writing a text and of telling what it asks to draw.

        Args:
            input_ids: [batch, length], `<s>`, the text and a begin-of-image token, padded on the right.
            lengths: [batch] tokens of each row.
            geometry, traits: as `toyworld.train_reader.SceneBatches` has them.
        """
        model, (batch, length) = self.model, input_ids.shape
        nothing = torch.empty(batch, length, 0, dtype=torch.long, device=input_ids.device)
        hidden = model.decode(model.embed(input_ids, None), model.no_images(), nothing, None)
        outputs = LanguageOutput(loss_txt=self._next_word(hidden, input_ids, lengths))
        rows = torch.arange(batch, device=input_ids.device)
        context, mask = model.image_context(hidden, ImagePositions(rows, lengths - 1, torch.zeros_like(rows)), length)
        conditions = model.image_decoder.resampler(context, mask)
        told = self.reader(self.standard(conditions.flatten(1))).float().unflatten(1, (KINDS, -1))
        self._read(told, geometry, traits, outputs)
        outputs.spread = spread(conditions.float())
        outputs.loss = outputs.loss_txt + outputs.loss_conditions + F.relu(-outputs.spread.log())
        return outputs

    def _next_word(self, hidden: Tensor, input_ids: Tensor, lengths: Tensor) -> Tensor:
        place = torch.arange(input_ids.shape[1] - 1, device=input_ids.device)
        learned = place < lengths[:, None] - 2  # the begin-of-image token is not written by the model
        targets = torch.where(learned, input_ids[:, 1:], -100)
        logits = self.model.lm_head(hidden[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @staticmethod
    def _read(told: Tensor, geometry: Tensor, traits: Tensor, outputs: LanguageOutput) -> None:
        """Put losses and accuracies of `told` [batch, KINDS, 1 + sum(TOLD)] into `outputs`."""
        there, wanted = kinds_told(geometry, traits)
        found, *parts = told.split([1, *TOLD.values()], dim=-1)
        found = found[..., 0]
        total = F.binary_cross_entropy_with_logits(found, there.float(), reduction="sum") / there.sum().clamp(min=1)
        guessed = found > 0
        outputs.accuracy_kind = (guessed & there).sum() / (guessed | there).sum().clamp(min=1)
        for index, (name, part) in enumerate(zip(TOLD, parts, strict=True)):
            total = total + F.cross_entropy(part[there], wanted[there][:, index])
            if f"accuracy_{name}" in LanguageOutput.__dataclass_fields__:
                outputs[f"accuracy_{name}"] = (part[there].argmax(-1) == wanted[there][:, index]).float().mean()
        outputs.loss_conditions = total

    def weights(self) -> dict[str, Tensor]:
        """What `model.language` of `mmi train` starts from."""
        learned = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        state = self.model.state_dict()
        return {name: state[name] for name in learned}


def kinds_told(geometry: Tensor, traits: Tensor) -> tuple[Tensor, Tensor]:
    """Which kinds a scene has, bool [batch, KINDS], and their traits as in `TOLD`, int64 [batch, KINDS, len(TOLD)].

    Of several things of one kind the last counts.
    """
    names = list(TRAITS)
    kind = traits[..., 1 + names.index("kind")]
    kind = torch.where(traits[..., 0] >= 0, kind, KINDS)  # one more kind for what is not there
    others = [traits[..., 1 + names.index(name)] for name in TOLD if name != "cell"]
    values = torch.stack([*others, cell_of(geometry)], -1)
    batch = torch.arange(len(traits), device=traits.device)
    there = torch.zeros(len(traits), KINDS + 1, dtype=torch.bool, device=traits.device)
    found = values.new_zeros(len(traits), KINDS + 1, len(TOLD))
    for number in range(traits.shape[1]):  # one after the other, so that "the last" means something
        there[batch, kind[:, number]] = True
        found[batch, kind[:, number]] = values[:, number]
    return there[:, :-1], found[:, :-1]
