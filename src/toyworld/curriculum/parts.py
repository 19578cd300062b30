"""What the tasks of the curriculum share: a linear probe, a measure of spread, and the files of trained parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from mm_interleaved.io import write_json

from ..scene import GRID


def spread(vectors: Tensor) -> Tensor:
    """Return the mean length of the deviations from the batch's mean, divided by the length of that mean.

    Args:
        vectors: [batch, count, width].
    """
    common = vectors.mean(0)
    return (vectors - common).norm(dim=-1).mean() / common.norm(dim=-1).mean()


class SharedReader(nn.Module):
    """A linear probe: the same linear layer predicts several categories from every vector.

    Each channel is standardised over the batch and all vectors first; see `curriculum.vision` for the reason.

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


def report(outputs: ModelOutput, right: Mapping[str, Tensor]) -> None:
    """Set the fields `accuracy_*` that `outputs` has to the accuracies of a probe."""
    for name, share in right.items():
        if f"accuracy_{name}" in vars(type(outputs))["__dataclass_fields__"]:
            outputs[f"accuracy_{name}"] = share


def cell_of(geometry: Tensor) -> Tensor:
    """Return the cell [...], int64, in which the middle of a box lies; `geometry` [..., 4] as in `SceneBatches`."""
    column, row = (geometry[..., :2] * GRID).long().clamp(0, GRID - 1).unbind(-1)
    return row * GRID + column


def save_part(state: Mapping[str, Tensor], quality: Mapping[str, float], file: Path) -> None:
    """Write the weights of a part, and `quality.json` beside them."""
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, file)
    write_json(file.parent / "quality.json", dict(quality))
