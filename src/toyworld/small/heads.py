"""Auxiliary classifiers (readers) of what images show and texts state; their losses are added to those of the model.

The small model starts from random weights: neither its CLIP nor its UNet is trained before. Without these losses the
image features and the conditioning tokens lose the content that no other part uses yet. The classifiers are not part of
the trained model.

All sizes are fixed, so that they can be part of a captured step. Axes: B images, N objects, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_interleaved.model import MMInterleavedConfig
from mm_interleaved.model.typed_modules import module_list

from ..detector import MAP, OUTPUTS, TRAITS, split
from ..scene import GRID, SIZES
from .stated import GROUND, OBJECTS, STATED


class MapReader(nn.Module):
    """Tells from a map where objects are and, at their middles, what they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, len(SIZES) * OUTPUTS)
        with torch.no_grad():  # middles are rare; without this the first steps only learn that
            self.linear.bias.view(len(SIZES), OUTPUTS)[:, 0] = -4.0

    def forward(self, features: Tensor, geometry: Tensor, traits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and shares that are right.

        Args:
            features: [B, D, side, side].
            geometry: [B, N, 4], traits: [B, N, 6]; see `train_detector.SceneBatches`.
        """
        features = F.adaptive_avg_pool2d(features, MAP) if features.shape[-1] > MAP else features
        side = features.shape[-1]
        cells = features.flatten(2).transpose(1, 2).float()  # [B, cells, D]
        weight, bias = self.linear.weight.unflatten(0, (len(SIZES), -1)), self.linear.bias.view(len(SIZES), -1)
        centers = F.linear(cells, weight[:, 0], bias[:, 0]).transpose(1, 2).unflatten(2, (side, side))
        real = traits[..., 0] >= 0
        size = traits[..., 0].clamp(min=0)
        at = geometry[..., :2] * side
        column, row = at.long().clamp(0, side - 1).unbind(-1)
        place = (row * side + column)[..., None].expand(-1, -1, cells.shape[-1])
        both = self.linear(cells.gather(1, place)).unflatten(-1, (len(SIZES), OUTPUTS))  # [B, N, sizes, OUTPUTS]
        own = torch.where((size == 0)[..., None], both[:, :, 0], both[:, :, 1])
        return self._losses(centers, own, at, column, row, real, size, geometry, traits)

    @staticmethod
    def _losses(
        centers: Tensor, own: Tensor, at: Tensor, column: Tensor, row: Tensor, real: Tensor, size: Tensor,
        geometry: Tensor, traits: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """As `train_detector.loss`, with weights in the place of selections."""
        count = real.sum().clamp(min=1)
        wanted = _bells(at, column, row, real, size, centers.shape[-1])
        chance = centers.sigmoid()
        focal = torch.where(
            wanted >= 1,
            (1 - chance) ** 2 * F.logsigmoid(centers),
            (1 - wanted) ** 4 * chance**2 * F.logsigmoid(-centers),
        )
        _, shifts, sides, logits = split(own[..., None, None])
        weight = real[..., None] / count
        total = -focal.sum() / count
        total = total + ((shifts[..., 0, 0] - (at - torch.stack([column, row], -1))).abs() * weight).sum() / 2
        total = total + 5 * ((sides[..., 0, 0] - geometry[..., 2:]).abs() * weight).sum() / 2
        right = {}
        for i, (name, values) in enumerate(logits.items()):
            truth = torch.where(real, traits[..., 1 + i], -100)
            values = values[..., 0, 0]
            total = total + F.cross_entropy(values.flatten(0, 1), truth.flatten(), reduction="sum") / count
            right[name] = ((values.argmax(-1) == truth) & real).sum() / count
        return total, right


def _bells(
    at: Tensor, column: Tensor, row: Tensor, real: Tensor, size: Tensor, side: int, sigma: float = 0.7
) -> Tensor:
    """A bell around every object, 1 in its own cell, the highest where bells meet: [B, sizes, side, side]."""
    grid = torch.arange(side, device=at.device) + 0.5
    bell = torch.exp(-((grid - at[..., None]) ** 2) / (2 * (sigma * side / MAP) ** 2))  # [B, N, 2, side]
    each = bell[:, :, 1, :, None] * bell[:, :, 0, None, :]
    cells = torch.arange(side, device=at.device)
    own = (cells == row[..., None])[..., :, None] & (cells == column[..., None])[..., None, :]
    each = torch.where(own, 1.0, each.clamp(max=0.999))
    by_size = [(each * (real & (size == s))[..., None, None]).amax(1) for s in range(len(SIZES))]
    return torch.stack(by_size, 1)


class Readers(nn.Module):
    """All readers of a model.

    Args:
        config: of the model.
    """

    def __init__(self, config: MMInterleavedConfig) -> None:
        super().__init__()
        width = config.vision_config.hidden_size
        self.maps = module_list([MapReader(width) for _ in range(3)])  # of the maps that the language model looks into
        self.tokens = SharedReader(
            config.text_config.hidden_size, {"there": 2, **{name: len(v) for name, v in TRAITS.items()}}
        )
        self.conditions = SharedReader(config.image_decoder.resampler.hidden_size, {**STATED, **GROUND})

    def of_images(
        self, tokens: Tensor, pyramid: list[Tensor], geometry: Tensor, traits: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of what the maps and the first tokens tell of the images, and shares that are right."""
        right: dict[str, Tensor] = {}
        total = torch.zeros((), device=tokens.device)
        for level, reader in enumerate(self.maps, 1):
            loss, found = reader(pyramid[level], geometry, traits)
            total = total + loss / len(self.maps)
            right |= {f"map{level}_{name}": share for name, share in found.items()}
        cells = tokens[:, : GRID * GRID]
        loss, found = self.tokens(cells.float(), cell_traits(geometry, traits)[:, : cells.shape[1]])
        apart = spread(tokens.float())
        right |= {f"token_{name}": share for name, share in found.items()} | {"token_spread": apart}
        return total + loss + F.relu(-apart.log()), right

    def of_conditions(self, conditions: Tensor, stated: Tensor, ground: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of what the first conditions tell of what texts state."""
        wanted = torch.full((len(stated), OBJECTS + 1, len(STATED) + 1), -100, device=stated.device)
        wanted[:, :OBJECTS, :-1], wanted[:, OBJECTS, -1] = stated, ground
        loss, found = self.conditions(conditions[:, : OBJECTS + 1].float(), wanted)
        apart = spread(conditions.float())
        right = {f"condition_{name}": share for name, share in found.items()} | {"condition_spread": apart}
        return loss + F.relu(-apart.log()), right


class SharedReader(nn.Module):
    """A linear probe: the same linear layer predicts several categories from every vector.

    Each channel is standardised over the batch and all vectors first, since what vectors share is much larger than
    what differs.

    Args:
        width: of a vector.
        values: the number of values of each category, by name.
    """

    def __init__(self, width: int, values: Mapping[str, int]) -> None:
        super().__init__()
        self.values = dict(values)
        self.standard = nn.BatchNorm1d(width, affine=False)
        self.linear = nn.Linear(width, sum(values.values()))

    def forward(self, vectors: Tensor, wanted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the categories' mean cross-entropies, and the accuracy of each by name.

        Args:
            vectors: [batch, count, width].
            wanted: [batch, count, categories], numbers of values; -100: ignored.
        """
        stated = self.linear(self.standard(vectors.transpose(1, 2)).transpose(1, 2)).float()
        total, right = stated.new_zeros(()), {}
        parts = stated.split(list(self.values.values()), dim=-1)
        for name, part, truth in zip(self.values, parts, wanted.unbind(-1), strict=True):
            asked = (truth >= 0).sum().clamp(min=1)
            total = total + F.cross_entropy(part.flatten(0, 1), truth.flatten(), reduction="sum") / asked
            right[name] = ((part.argmax(-1) == truth) & (truth >= 0)).sum() / asked
        return total, right


def spread(vectors: Tensor) -> Tensor:
    """Return the mean length of the deviations from the batch's mean, divided by the length of that mean.

    Args:
        vectors: [batch, count, width].
    """
    common = vectors.mean(0)
    return (vectors - common).norm(dim=-1).mean() / common.norm(dim=-1).mean()


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


def cell_of(geometry: Tensor) -> Tensor:
    """Return the cell [...], int64, in which the middle of a box lies; `geometry` [..., 4] as in `SceneBatches`."""
    column, row = (geometry[..., :2] * GRID).long().clamp(0, GRID - 1).unbind(-1)
    return row * GRID + column
