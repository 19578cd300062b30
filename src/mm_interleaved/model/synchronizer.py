"""The gated MMFS of a decoder layer, and the image features that it attends to.

Axes: B batch, L tokens, D width, I images, S spatial positions of all levels, N heads, H width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.deformable import Shapes
from .config import MMInterleavedConfig
from .fused import add_affine, affine
from .mmfs import MMFS, DerivedOutput, DerivedQuery, VisibleImages
from .rms_norm import RMSNorm
from .weights import is_intercepted, is_plain


@dataclass
class DerivedSynchronizer:
    """Derived weights of one synchronizer for one generation call; see `Synchronizer.derive`.

    Attributes:
        query: the query maps of MMFS as one linear layer.
        output: the output projection times the gate.
    """

    query: DerivedQuery
    output: DerivedOutput


@dataclass
class ImageFeatures:
    """The features of the images that the language model attends to.

    Attributes:
        features: [I, S, vision width], the levels of `mmfs.levels` one after the other.
        shapes: (height, width) of every level.
        values: for every synchronizer its values [I, S, N, H], projected once; None: projected in every call
            (training).
        derived: for every synchronizer its derived weights, or None if its modules must be called; None: none has any.
    """

    features: Tensor
    shapes: Shapes
    values: list[Tensor] | None = None
    derived: list[DerivedSynchronizer | None] | None = None

    def __len__(self) -> int:
        return len(self.features if self.values is None or not self.values else self.values[0])


class Synchronizer(nn.Module):
    """x + tanh(gate) * MMFS(norm(x), norm(maps)), for the tokens x of one decoder layer."""

    def __init__(self, config: MMInterleavedConfig, index: int) -> None:
        super().__init__()
        width, feature_width = config.text_config.hidden_size, config.vision_config.hidden_size
        eps = config.text_config.rms_norm_eps
        self.index = index
        self.base_size = config.mmfs.base_size or config.grid_size
        self.query_norm = RMSNorm(width, eps)
        self.feature_norm = RMSNorm(feature_width, eps)
        self.mmfs = MMFS(config.mmfs, width, feature_width)
        self.gate = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        """The gate starts at 0."""
        nn.init.zeros_(self.gate)

    def project(self, features: Tensor) -> Tensor:
        """Values [I, S, N, H] of `features` [I, S, vision width]."""
        return self.mmfs.project(self.feature_norm(features))

    @torch.no_grad()
    def derive(self, out: DerivedSynchronizer | None = None) -> DerivedSynchronizer | None:
        """The derived weights, from the current weights; None if a module must be called.

        Args:
            out: tensors to write into, for captured graphs, which read fixed addresses; None: new tensors.
        """
        mmfs = self.mmfs
        if not is_plain(mmfs.output_proj) or is_intercepted(self, mmfs) or mmfs.implementation != "fast":
            return None
        query = mmfs.derive_query(None if out is None else out.query)
        if query is None:
            return None
        weight, bias = mmfs.output_proj.weight, mmfs.output_proj.bias
        output = DerivedOutput(torch.empty_like(weight), torch.empty_like(bias)) if out is None else out.output
        gate = self.gate.tanh()
        torch.mul(weight, gate, out=output.weight)
        torch.mul(bias, gate, out=output.bias)
        return DerivedSynchronizer(query, output)

    def forward(self, hidden: Tensor, images: ImageFeatures, visible: VisibleImages) -> Tensor:
        """`hidden` [B, L, D] plus the gated MMFS; a group of `visible` is one token."""
        values = self.project(images.features) if images.values is None else images.values[self.index]
        derived = None if images.derived is None else images.derived[self.index]
        centre = torch.full((1, 1, 2), 0.5, device=hidden.device)
        slots = visible.images.shape[1]
        if derived is None or slots == 0:
            query = self.query_norm(hidden).flatten(0, 1)[:, None]
            seen = self.mmfs(query, values, visible, images.shapes, centre, self.base_size)
            return hidden + (self.gate.tanh() * seen.view_as(hidden)).to(hidden.dtype)
        both = affine(hidden, derived.query.weight, derived.query.bias, self.query_norm).flatten(0, 1)[:, None]
        sides = self.mmfs.split(both, derived.query.table[:slots])
        mixed = self.mmfs.mix(sides, values, visible, images.shapes, centre, self.base_size, hidden.dtype)
        return add_affine(hidden, mixed.view(*hidden.shape[:-1], -1), derived.output.weight, derived.output.bias)
