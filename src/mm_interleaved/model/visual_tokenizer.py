"""An image becomes visual tokens for the language model and a pyramid of maps for the synchronizers.

Axes: I images; g is the side of the patch grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import MMInterleavedConfig
from .positions import PositionTable
from .resampler import Resampler
from .vit_adapter import ViTAdapter

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class VisualFeatures:
    """What the model knows about some images.

    Attributes:
        tokens: [I, num_image_tokens, text width], the images' embeddings in the text.
        pyramid: four maps [I, vision width, side, side], fine to coarse, with positions added.
        last_hidden_state: [I, 1 + g * g, vision width] of the vision tower, class token first.
    """

    tokens: Tensor
    pyramid: list[Tensor]
    last_hidden_state: Tensor


class VisualTokenizer(nn.Module):
    """CLIP with adapter, then the resampler and a projection to the language model's width."""

    def __init__(self, config: MMInterleavedConfig) -> None:
        super().__init__()
        width, grid = config.vision_config.hidden_size, config.grid_size
        self.encoder = ViTAdapter(config.vision_config, config.adapter)
        self.pos_proj = nn.Linear(width, width)
        self.pos_norm = nn.LayerNorm(width, eps=1e-6)
        self.post_norm = nn.LayerNorm(width, eps=1e-6)
        self.resampler = Resampler(config.visual_resampler, width)
        self.proj = nn.Linear(config.visual_resampler.hidden_size, config.text_config.hidden_size)
        self.grid_positions = PositionTable.grid(grid, width)
        self.pyramid_positions = nn.ModuleList(
            [PositionTable.grid(grid, width, resize_to=side) for side in config.pyramid_sides]
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The projection into the language model starts small, so that images enter quietly."""
        nn.init.normal_(self.proj.weight, std=1e-3)
        nn.init.zeros_(self.proj.bias)

    def forward(self, pixels: Tensor) -> VisualFeatures:
        """Encode `pixels` [I, 3, image_size, image_size] with values in [0, 1]."""
        dtype = self.proj.weight.dtype
        # Channel by channel, because a tensor of constants would make an accelerator wait for its copy.
        channels = zip(pixels.unbind(1), CLIP_MEAN, CLIP_STD, strict=True)
        normal = torch.stack([(channel - mean) / deviation for channel, mean, deviation in channels], dim=1)
        hidden, maps = self.encoder(normal.to(dtype))
        pyramid = [
            m + table().to(dtype).T.unflatten(1, m.shape[-2:])
            for m, table in zip(maps, self.pyramid_positions, strict=True)
        ]
        positions = self.grid_positions().to(dtype)
        positions = torch.cat([torch.zeros_like(positions[:1]), positions])  # none for the class token
        features = self.post_norm(self.pos_norm(self.pos_proj(hidden)) + positions)
        return VisualFeatures(self.proj(self.resampler(features)), pyramid, hidden)
