"""The Inception v3 of FID, for its published weights.

The network of TensorFlow's `inception_2015-12-05` graph (Szegedy et al., arXiv 1512.00567), which differs from the
common Inception v3: average pooling excludes the padding, and the last block has max pooling. Existing packages for it
require torchvision. Parameter names are those of the weight file `pt_inception-2015-12-05-6726825d.pth`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .result import MissingRequirement

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_NAME}"
PIXELS = 299
FEATURES = 2048
Pooling = Callable[[torch.Tensor], torch.Tensor]


class _Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, stride: int = 1) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if stride == 2 else (sides[0] // 2, sides[1] // 2)
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


def _unpadded(layer: _Conv) -> _Conv:
    layer.conv.padding = (0, 0)
    return layer


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _average(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _largest(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halved(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=2)


class _Block(nn.Module):
    """Parallel branches whose outputs are concatenated.

    Args:
        inputs: number of input channels.
        branches: for each branch a pooling, then its convolutions: name, channels, kernel and stride. Two in a list
            have the same input, and their outputs are concatenated.
    """

    def __init__(self, inputs: int, *branches: Sequence[Any]) -> None:
        super().__init__()
        self.branches: list[tuple[Pooling, list[list[str]]]] = []
        for pooling, *layers in branches:
            width, groups = inputs, [layer if isinstance(layer, list) else [layer] for layer in layers]
            for group in groups:
                for name, *sizes in group:
                    self.add_module(name, _Conv(width, *sizes))
                width = group[-1][1]
            self.branches.append((pooling, [[name for name, *_ in group] for group in groups]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = []
        for pooling, groups in self.branches:
            y = pooling(x)
            for names in groups:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            found.append(y)
        return torch.cat(found, 1)


def _block_a(inputs: int, pooled: int) -> _Block:
    return _Block(
        inputs, (_same, ("branch1x1", 64)), (_same, ("branch5x5_1", 48), ("branch5x5_2", 64, 5)),
        (_same, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
        (_average, ("branch_pool", pooled)),
    )  # fmt: skip


def _block_b(inputs: int) -> _Block:
    return _Block(
        inputs, (_same, ("branch3x3", 384, 3, 2)),
        (_same, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)), (_halved,),
    )  # fmt: skip


def _block_c(inputs: int, inner: int) -> _Block:
    row, column = (1, 7), (7, 1)
    return _Block(
        inputs, (_same, ("branch1x1", 192)),
        (_same, ("branch7x7_1", inner), ("branch7x7_2", inner, row), ("branch7x7_3", 192, column)),
        (_same, ("branch7x7dbl_1", inner), ("branch7x7dbl_2", inner, column), ("branch7x7dbl_3", inner, row),
         ("branch7x7dbl_4", inner, column), ("branch7x7dbl_5", 192, row)),
        (_average, ("branch_pool", 192)),
    )  # fmt: skip


def _block_d(inputs: int) -> _Block:
    return _Block(
        inputs, (_same, ("branch3x3_1", 192), ("branch3x3_2", 320, 3, 2)),
        (_same, ("branch7x7x3_1", 192), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
         ("branch7x7x3_4", 192, 3, 2)), (_halved,),
    )  # fmt: skip


def _block_e(inputs: int, pooling: Pooling) -> _Block:
    row, column = (1, 3), (3, 1)
    return _Block(
        inputs, (_same, ("branch1x1", 320)),
        (_same, ("branch3x3_1", 384), [("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column)]),
        (_same, ("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3),
         [("branch3x3dbl_3a", 384, row), ("branch3x3dbl_3b", 384, column)]),
        (pooling, ("branch_pool", 192)),
    )  # fmt: skip


class FIDInception(nn.Module):
    """Images [B, 3, H, W] in [0, 1] to features [B, 2048]: the average over the last feature map ("pool3")."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _unpadded(_Conv(32, 32, 3))
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _unpadded(_Conv(80, 192, 3))
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_a(192, 32), _block_a(256, 64), _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b, self.Mixed_6c = _block_c(768, 128), _block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = _block_c(768, 160), _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b, self.Mixed_7c = _block_e(1280, _average), _block_e(2048, _largest)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize to 299 pixels, bilinearly and without antialiasing as FID requires, and run the network."""
        x = 2 * F.interpolate(images, (PIXELS, PIXELS), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))))
        return self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))

    @classmethod
    def load(cls, path: Path | None) -> FIDInception:
        """Read published weights, `.pth` (tensors only) or `.safetensors`; those of the classifier are ignored.

        Raises:
            MissingRequirement: there is no path, or no file there.
            ValueError: the file has other tensors.
        """
        fix = f"fetch {WEIGHTS_URL} and give its path"
        if path is None:
            raise MissingRequirement("no weight file of the Inception network was given", fix)
        if not path.is_file():
            raise MissingRequirement(f"{path}: no such weight file", fix)
        with torch.device("meta"):
            net = cls()
        try:
            state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
            state = {name: value for name, value in state.items() if not name.startswith("fc.")}
            for name in net.state_dict():
                if name.endswith("num_batches_tracked"):  # training counters, which older files lack
                    state.setdefault(name, torch.tensor(0))
            net.load_state_dict(state, assign=True)
        except (RuntimeError, SafetensorError, UnpicklingError, EOFError, AttributeError) as error:
            raise ValueError(f"{path}: not the Inception weights that FID needs ({error}); {fix}") from error
        return net.float().eval().requires_grad_(False)
