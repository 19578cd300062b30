"""Pre-training of the visual tokenizer of a small model: its outputs have to tell what a scene holds.

The release starts from CLIP. A small model starts from nothing, and the loss of the next token alone trains its visual
tokenizer very slowly. So linear probes predict what is where, from every output that other parts of the model use:

    loss = mean over the levels of the pyramid of `toyworld.train_detector.loss`
           + loss of the probe on the visual tokens + max(0, -ln spread)

Each level is resized to the 16 x 16 map of the labels and read by a 1 x 1 convolution. The first nine visual tokens
stand for the 3 x 3 cells of the scene, and one linear layer predicts the object in each cell. It is shared, since the
attention of the language model treats all tokens alike, too. The probes are not kept.

`spread` is the mean length of the tokens' deviations from their mean over the images, divided by the length of that
mean. The common part says nothing about an image, but without a loss it grows until it dominates. So the tokens are
standardised before the probe, and a low spread has a loss.

Axes: B batch, O objects (at most 9), h and w height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from mm_interleaved.model import MMInterleavedConfig
from mm_interleaved.model.mm_interleaved import unit_range
from mm_interleaved.model.typed_modules import module_list
from mm_interleaved.model.visual_tokenizer import VisualTokenizer

from ..detector import MAP, OUTPUTS, TRAITS, split
from ..scene import GRID, SIZES
from ..train_detector import loss as scene_loss
from .parts import SharedReader, cell_of, report, spread


@dataclass
class VisionOutput(ModelOutput):
    """Losses of a batch and the accuracy of the probe on the tokens.

    Attributes:
        loss: their sum.
        loss_maps: of the probes on the pyramid, mean over its levels.
        loss_tokens: of the probe on the visual tokens, mean over the cells.
        accuracy_kind, accuracy_color, accuracy_texture, accuracy_glyph: of the objects, predicted from the tokens.
        accuracy_maps: share of the objects whose kind and colour the finest level predicts.
        spread: mean length of the tokens' deviation from their mean over the images, by the mean's length.
    """

    loss: Tensor | None = None
    loss_maps: Tensor | None = None
    loss_tokens: Tensor | None = None
    accuracy_kind: Tensor | None = None
    accuracy_color: Tensor | None = None
    accuracy_texture: Tensor | None = None
    accuracy_glyph: Tensor | None = None
    accuracy_maps: Tensor | None = None
    spread: Tensor | None = None


class VisionTask(nn.Module):
    """A visual tokenizer with its probes.

    Args:
        config: of the model that it is for.
    """

    def __init__(self, config: MMInterleavedConfig) -> None:
        super().__init__()
        width, levels = config.vision_config.hidden_size, len(config.pyramid_sides)
        self.visual_tokenizer = VisualTokenizer(config)
        self.map_readers = module_list([nn.Conv2d(width, len(SIZES) * OUTPUTS, 1) for _ in range(levels)])
        values = {"there": 2, **{name: len(v) for name, v in TRAITS.items()}}
        self.token_reader = SharedReader(config.text_config.hidden_size, values)
        with torch.no_grad():  # centres are rare; without this the first steps learn nothing else
            for reader in self.map_readers:
                assert reader.bias is not None
                reader.bias.view(len(SIZES), OUTPUTS)[:, 0] = -4.0

    def forward(self, images: Tensor, geometry: Tensor, traits: Tensor) -> VisionOutput:
        """Return the losses of predicting what is where.

        Args:
            images: uint8 [B, 3, h, w], of the model's image size.
            geometry, traits: [B, O, 4] and [B, O, 6], see `toyworld.train_detector.SceneBatches`.
        """
        seen = self.visual_tokenizer(unit_range(images))
        maps = [
            reader(_resized(m)).unflatten(1, (len(SIZES), OUTPUTS))
            for reader, m in zip(self.map_readers, seen.pyramid, strict=True)
        ]
        cells = seen.tokens[:, : GRID * GRID]
        with torch.autocast(images.device.type, enabled=False):
            of_maps = [torch.stack(list(scene_loss(m, geometry, traits).values())).sum() for m in maps]
            outputs = VisionOutput()
            wanted = cell_traits(geometry, traits)[:, : cells.shape[1]]
            loss_tokens, right = self.token_reader(cells.float(), wanted)
            outputs.loss_tokens = loss_tokens
            report(outputs, right)
            outputs.spread = spread(seen.tokens.float())
            outputs.accuracy_maps = _named(maps[0], geometry, traits)
            outputs.loss_maps = torch.stack(of_maps).mean()
            outputs.loss = outputs.loss_maps + loss_tokens + F.relu(-outputs.spread.log())
        return outputs

    def weights(self) -> dict[str, Tensor]:
        """What `model.weights` of `mmi train` starts from, by the names in a model.

        They are scaled so that an entry of a token has a mean square of 1. A language model finds out the sooner what
        tokens tell the longer they are: short ones drown in what its layers add to them.
        """
        seen = self.token_reader.standard
        assert seen.running_mean is not None
        assert seen.running_var is not None
        scale = (seen.running_mean.square() + seen.running_var).mean().rsqrt()
        state = self.visual_tokenizer.state_dict()
        scaled = {name: value * scale if name.startswith("proj.") else value for name, value in state.items()}
        return {f"visual_tokenizer.{name}": value for name, value in scaled.items()}


def cell_traits(geometry: Tensor, traits: Tensor) -> Tensor:
    """What stands in each cell: int64 [batch, cells, 1 + traits], first whether there is an object (1) or not (0).

    Of several objects in one cell the last counts; traits of no object are -100.
    """
    real = traits[..., 0] >= 0
    found = traits.new_full((len(traits), GRID * GRID + 1, traits.shape[-1]), -100)
    found[..., 0] = 0
    cell = torch.where(real, cell_of(geometry), GRID * GRID)  # one more cell for what is not there
    batch = torch.arange(len(traits), device=traits.device)
    for number in range(traits.shape[1]):  # one after the other, so that "the last" means something
        entry = torch.cat([torch.ones_like(traits[:, number, :1]), traits[:, number, 1:]], -1)
        found[batch, cell[:, number]] = entry
    return found[:, :-1]


def _resized(m: Tensor) -> Tensor:
    """A map at the side of the labels' map."""
    if m.shape[-1] > MAP:
        return F.adaptive_avg_pool2d(m, MAP)
    return F.interpolate(m, size=MAP, mode="bilinear", align_corners=False)


def _named(outputs: Tensor, geometry: Tensor, traits: Tensor) -> Tensor:
    """Share of the objects whose kind and colour a map [batch, sizes, OUTPUTS, side, side] tells at their centres."""
    image, number = (traits[..., 0] >= 0).nonzero(as_tuple=True)
    column, row = (geometry[image, number, :2] * MAP).long().clamp(0, MAP - 1).unbind(-1)
    size, logits = traits[image, number, 0], split(outputs)[-1]
    kind, color = (logits[name][image, size, :, row, column].argmax(-1) for name in ("kind", "color"))
    names = list(TRAITS)
    kinds, colors = (traits[image, number, 1 + names.index(name)] for name in ("kind", "color"))
    return ((kind == kinds) & (color == colors)).float().mean()
