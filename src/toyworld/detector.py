"""A detector of objects in drawn or generated images, so that images can be scored without a human.

A small convolutional net after CenterNet (Zhou et al., "Objects as Points", arXiv 1904.07850): a map of how likely a
object's centre lies in each 8 x 8 pixels, and at each of them what the object would look like. Small and big objects
have maps of their own, since an object inside another has the same centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .kinds import KINDS
from .scene import COLORS, GLYPHS, GRID, PARTS, SIZES, TEXTURES, Attributes
from .sprites import ASSETS

PIXELS = 128  # what the net reads
STRIDE = 8
MAP = PIXELS // STRIDE
TWICE = 1 / 12  # images; two of the same kind and colour nearer than this are one
WEIGHTS = ASSETS / "detector.safetensors"
TRAITS: dict[str, tuple[str, ...]] = {
    "kind": tuple(KINDS),
    "color": COLORS,
    "texture": TEXTURES,
    "part": PARTS,
    "glyph": ("", *GLYPHS),
}
"""The values of each attribute, in the order of the outputs."""
_GEOMETRY = 1 + 4  # how likely a centre; its shift within the cell of the map, x and y; box, width and height
OUTPUTS = _GEOMETRY + sum(len(values) for values in TRAITS.values())


@dataclass(frozen=True)
class Detection:
    """An object that was found in an image.

    Attributes:
        attributes: what it looks like.
        cell: row * GRID + column of the cell in which its centre lies.
        size: "small" or "big".
        box: x0, y0, x1, y1 in [0, 1] of the image, as if nothing hid it.
        score: how likely there is an object, in [0, 1].
    """

    attributes: Attributes
    cell: int
    size: str
    box: tuple[float, ...]
    score: float

    @property
    def center(self) -> tuple[float, float]:
        """Middle of its box, (x, y)."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def _conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class _Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _conv(width, width), _conv(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class DetectorNet(nn.Module):
    """Images to maps.

    Args:
        width: channels at a quarter of the resolution; twice as many at an eighth.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 32, 2, 5), nn.ReLU(), _conv(32, width, 2), nn.ReLU())
        self.fine = nn.Sequential(_Block(width), _conv(width, 2 * width, 2), nn.ReLU())
        self.coarse = nn.Sequential(_Block(2 * width), _Block(2 * width))
        self.head = nn.Sequential(_conv(2 * width, 2 * width), nn.ReLU())
        self.out = nn.Conv2d(2 * width, len(SIZES) * OUTPUTS, 1)
        bias = self.out.bias
        assert bias is not None
        with torch.no_grad():  # centres are rare; without this the first steps only learn that
            bias.view(len(SIZES), OUTPUTS)[:, 0] = -4.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Read images.

        Args:
            images: [B, 3, 128, 128], in [0, 1].

        Returns:
            [B, 2, OUTPUTS, 16, 16]: for small and big objects the logit of a centre, its shift in [0, 1] in x and y,
            the box's width and height in images, and the logits of each of `TRAITS`.
        """
        x = self.head(self.coarse(self.fine(self.stem(images * 2 - 1))))
        return self.out(x).unflatten(1, (len(SIZES), OUTPUTS))


def split(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Take the third last dimension of the net's outputs apart: centre logits, shifts, boxes, logits of each trait."""
    parts = outputs.split([1, 2, 2, *(len(values) for values in TRAITS.values())], dim=-3)
    return parts[0].squeeze(-3), parts[1], parts[2], dict(zip(TRAITS, parts[3:], strict=True))


def to_tensor(images: Sequence[PIL.Image.Image]) -> torch.Tensor:
    """Images of any size and mode as the net reads them: float32 [B, 3, 128, 128] in [0, 1]."""
    ready = []
    for image in images:
        one = image.convert("RGB")
        if one.size != (PIXELS, PIXELS):
            one = one.resize((PIXELS, PIXELS), PIL.Image.Resampling.BICUBIC)
        ready.append(np.asarray(one))
    return torch.from_numpy(np.stack(ready)).permute(0, 3, 1, 2).float() / 255


class Detector:
    """The net with its weights, from images to objects.

    Args:
        net: trained.
        threshold: least score of an object.
    """

    def __init__(self, net: DetectorNet, threshold: float = 0.4) -> None:
        self.net, self.threshold = net.eval(), threshold

    @classmethod
    def load(cls, path: Path = WEIGHTS, device: torch.device | str = "cpu") -> Detector:
        """Load trained weights; by default those that ship with the package.

        Raises:
            FileNotFoundError: there are none.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no detector's weights; train them: {train_command(path)}")
        net = DetectorNet()
        net.load_state_dict(load_file(path))  # what was stored in half precision becomes float32
        return cls(net.to(device))

    @torch.inference_mode()
    def detect(self, images: Sequence[PIL.Image.Image], batch: int = 64) -> list[list[Detection]]:
        """Find the objects in each image, the surest first.

        Args:
            images: of any size, mode RGB or convertible.
            batch: how many are read at a time.
        """
        device = next(self.net.parameters()).device
        found: list[list[Detection]] = []
        for start in range(0, len(images), batch):
            inputs = to_tensor(images[start : start + batch]).to(device)
            found += self.objects(self.net(inputs).float().cpu())
        return found

    def objects(self, outputs: torch.Tensor) -> list[list[Detection]]:
        """Return the objects that the outputs of the net [B, 2, OUTPUTS, 16, 16] stand for, by image."""
        centers, shifts, sides, traits = split(outputs)
        scores = centers.sigmoid()
        peaks = (F.max_pool2d(scores, 3, 1, 1) == scores) & (scores >= self.threshold)
        best = {name: logits.argmax(2).tolist() for name, logits in traits.items()}
        found: list[list[Detection]] = [[] for _ in outputs]
        for image, size, row, column in peaks.nonzero().tolist():
            attributes = {name: TRAITS[name][best[name][image][size][row][column]] for name in TRAITS}
            x, y = ((torch.tensor([column, row]) + shifts[image, size, :, row, column]) / MAP).clamp(0, 1).tolist()
            width, height = sides[image, size, :, row, column].clamp(0, 1).tolist()
            cell = min(int(y * GRID), GRID - 1) * GRID + min(int(x * GRID), GRID - 1)
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            score = float(scores[image, size, row, column])
            found[image].append(Detection(Attributes(**attributes), cell, SIZES[size], box, score))
        return [_once(sorted(seen, key=lambda one: -one.score)) for seen in found]


def _once(seen: list[Detection]) -> list[Detection]:
    """Drop objects that were found twice, as small and as big: same kind and colour, almost the same place."""
    kept: list[Detection] = []
    for one in seen:
        (x, y), key = one.center, (one.attributes.kind, one.attributes.color)
        near = (o for o in kept if max(abs(o.center[0] - x), abs(o.center[1] - y)) < TWICE)
        if key not in [(o.attributes.kind, o.attributes.color) for o in near]:
            kept.append(one)
    return kept


def train_command(output: Path = WEIGHTS) -> str:
    """Return the command that trains weights."""
    return f"python -m toyworld.train_detector --output {output}"
