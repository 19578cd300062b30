"""CLIP's vision tower with a ViT adapter around it (ViT-Adapter, arXiv 2205.08534).

A convolutional stem (the spatial prior) gives maps at 1/4, 1/8, 1/16 and 1/32 of the image. Four times, the stem's
features are injected into the patch tokens, a quarter of CLIP's layers run, and the tokens are extracted back into the
stem's features. The result is a pyramid of four maps with sides 4g, 2g, g and g/2, where g is the side of the patch
grid.

What differs from the papers, and must, because the weights were trained so: CLIP's last LayerNorm is absent, and the
pyramid is not normalised.

Axes: B batch of images, Q queries, S spatial positions of all levels, D width; g is the side of the patch grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..ops import deformable_attention_around, promote
from ..ops.deformable import Shapes
from ..ops.mmfs_attention import Backend
from .config import AdapterConfig
from .typed_modules import module_list

NUM_INTERACTIONS = 4  # one for each level of the pyramid


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of every pixel of an NCHW map; sums run in float32 or better.

    The result lies in memory with the channels last, as the norm needs them and as a GPU's convolutions want them.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def reset_parameters(self) -> None:
        """Gain 1, bias 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, height, width], normalised."""
        work = self.weight.dtype if self.weight.dtype == x.dtype else promote(x.dtype)  # alike: PyTorch sums well
        weight, bias = self.weight.to(work), self.bias.to(work)
        normed = F.layer_norm(x.to(work).movedim(1, -1), weight.shape, weight, bias, self.eps)
        return normed.movedim(-1, 1).to(x.dtype)


class SpatialPrior(nn.Module):
    """The convolutional stem: an image of side 16g to four maps with sides 4g, 2g, g and g/2."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()

        def conv(inner: int, outer: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), ChannelNorm(outer), nn.ReLU()]

        widths = [channels, 2 * channels, 4 * channels, 4 * channels]
        self.stem = nn.Sequential(
            *conv(3, channels, 2), *conv(channels, channels, 1), *conv(channels, channels, 1), nn.MaxPool2d(3, 2, 1)
        )
        self.conv2 = nn.Sequential(*conv(widths[0], widths[1], 2))
        self.conv3 = nn.Sequential(*conv(widths[1], widths[2], 2))
        self.conv4 = nn.Sequential(*conv(widths[2], widths[3], 2))
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Conv2d(w, width, 1) for w in widths)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixels [B, 3, 16g, 16g] to four maps [B, D, side, side], fine to coarse."""
        c1 = self.stem(pixels.contiguous(memory_format=torch.channels_last))  # and so it stays, see `ChannelNorm`
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)


class DeformableAttention(nn.Module):
    """Deformable attention as in Deformable DETR (arXiv 2010.04159): every level has its own offsets."""

    def __init__(self, width: int, config: AdapterConfig, levels: int) -> None:
        super().__init__()
        self.heads, self.points, self.levels = config.num_heads, config.num_points, levels
        # The kernels of MMFS take 0.8 (forward, one level) to 1.8 times as long on an H200: `mmi bench --only adapter`.
        self.backend: Backend = "plain"
        inner = int(width * config.value_ratio)
        self.sampling_offsets = nn.Linear(width, self.heads * levels * self.points * 2)
        self.attention_weights = nn.Linear(width, self.heads * levels * self.points)
        self.value_proj = nn.Linear(width, inner)
        self.output_proj = nn.Linear(inner, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initially every head samples in its own direction, and each point one step further than the one before.

        The original intended this, but its library's generic initialisation overwrote the directions, so that in
        released weights the points of a head coincide.
        """
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angles.cos(), angles.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        bias = (direction[:, None, None] * steps[:, None]).expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.reshape(-1))
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, reference: Tensor, features: Tensor, shapes: Shapes) -> Tensor:
        """`query` [B, Q, D] around `reference` [Q, 2] into square maps `features` [B, S, D]."""
        work = promote(query.dtype)
        value = self.value_proj(features).unflatten(-1, (self.heads, -1))
        layout = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).to(work).unflatten(-1, (*layout, 2))
        logits = self.attention_weights(query).to(work).unflatten(-1, layout)
        seen = deformable_attention_around(value, shapes, offsets, logits, reference, self.backend)
        return self.output_proj(seen)


class Injector(GradientCheckpointingLayer):
    """Adds what the stem's maps show to the patch tokens, through a gain that starts at zero."""

    def __init__(self, width: int, config: AdapterConfig) -> None:
        super().__init__()
        self.query_norm, self.feature_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = DeformableAttention(width, config, levels=3)
        self.gamma = nn.Parameter(torch.zeros(width))

    def reset_parameters(self) -> None:
        """The gain."""
        nn.init.zeros_(self.gamma)

    def forward(self, tokens: Tensor, stem: Tensor, reference: Tensor, shapes: Shapes) -> Tensor:
        """`tokens` [B, g * g, D], `stem` [B, S, D]."""
        seen = self.attention(self.query_norm(tokens), reference, self.feature_norm(stem), shapes)
        return tokens + self.gamma * seen


class ConvMLP(nn.Module):
    """An MLP with a depthwise 3x3 convolution inside, run over each map of the stem separately."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.fc2 = nn.Linear(hidden, width)

    def reset_parameters(self) -> None:
        """Zero biases; the weights keep PyTorch's default."""
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """[B, S, D] with the maps one after the other."""
        parts = self.fc1(x).split([h * w for h, w in shapes], dim=1)
        maps = [self.conv(p.transpose(1, 2).unflatten(2, s)) for p, s in zip(parts, shapes, strict=True)]
        return self.fc2(F.gelu(torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)))


class Extractor(GradientCheckpointingLayer):
    """Updates the stem's maps with what the patch tokens know."""

    def __init__(self, width: int, config: AdapterConfig) -> None:
        super().__init__()
        self.query_norm, self.feature_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = DeformableAttention(width, config, levels=1)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = ConvMLP(width, int(width * config.mlp_ratio))

    def forward(self, stem: Tensor, tokens: Tensor, reference: Tensor, shapes: Shapes, grid: int) -> Tensor:
        """`stem` [B, S, D], `tokens` [B, grid * grid, D]."""
        seen = self.attention(self.query_norm(stem), reference, self.feature_norm(tokens), [(grid, grid)])
        stem = stem + seen
        return stem + self.mlp(self.mlp_norm(stem), shapes)


class Interaction(nn.Module):
    """One exchange: inject before, extract after a group of CLIP layers."""

    def __init__(self, width: int, config: AdapterConfig, num_extra: int) -> None:
        super().__init__()
        self.injector = Injector(width, config)
        self.extractor = Extractor(width, config)
        self.extra_extractors = module_list([Extractor(width, config) for _ in range(num_extra)])


def cell_centres(sides: list[int], device: torch.device) -> Tensor:
    """(x, y) in [0, 1] of the centre of every cell of square maps, row-major, one map after the other: [cells, 2]."""
    grids = []
    for side in sides:
        line = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side
        y, x = torch.meshgrid(line, line, indexing="ij")
        grids.append(torch.stack([x, y], -1).view(-1, 2))
    return torch.cat(grids)


class ViTAdapter(nn.Module):
    """CLIP layers and adapter: normalised pixels to patch features and a feature pyramid."""

    def __init__(self, vision: CLIPVisionConfig, adapter: AdapterConfig) -> None:
        super().__init__()
        width = vision.hidden_size
        assert isinstance(vision.image_size, int)
        assert isinstance(vision.patch_size, int)
        self.grid = vision.image_size // vision.patch_size
        tower = CLIPVisionModel(vision)  # made and initialised by the library; its last LayerNorm stays behind
        self.embeddings, self.pre_layernorm, self.layers = tower.embeddings, tower.pre_layrnorm, tower.encoder.layers
        self.spatial_prior = SpatialPrior(adapter.stem_channels, width)
        self.level_embed = nn.Parameter(torch.zeros(3, width))
        extra = [0] * (NUM_INTERACTIONS - 1) + [adapter.num_extra_extractors]
        self.interactions = module_list([Interaction(width, adapter, n) for n in extra])
        self.upsample = nn.ConvTranspose2d(width, width, 2, 2)

    def reset_parameters(self) -> None:
        """The level embedding starts at zero."""
        nn.init.zeros_(self.level_embed)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode images.

        Args:
            pixels: [B, 3, image_size, image_size], normalised with CLIP's mean and deviation.

        Returns:
            Last hidden state [B, 1 + g * g, D] (class token first), and the maps [B, D, side, side]
            with sides 4g, 2g, g, g/2.
        """
        g = self.grid
        sides = [2 * g, g, g // 2]
        shapes = [(side, side) for side in sides]
        patch_centres, stem_centres = cell_centres([g], pixels.device), cell_centres(sides, pixels.device)

        c1, *coarser = self.spatial_prior(F.interpolate(pixels, size=16 * g, mode="bilinear", align_corners=False))
        stem = [c.flatten(2).transpose(1, 2) + e for c, e in zip(coarser, self.level_embed, strict=True)]
        stem = torch.cat(stem, dim=1)

        hidden = self.pre_layernorm(self.embeddings(pixels))
        per_group = len(self.layers) // NUM_INTERACTIONS
        stages = []
        for index, interaction in enumerate(self.interactions):
            cls, tokens = hidden[:, :1], hidden[:, 1:]
            tokens = interaction.injector(tokens, stem, patch_centres, shapes)
            hidden = torch.cat([cls, tokens], dim=1)
            for layer in self.layers[index * per_group : (index + 1) * per_group]:
                hidden = layer(hidden, None)
            for extractor in (interaction.extractor, *interaction.extra_extractors):
                stem = extractor(stem, hidden[:, 1:], stem_centres, shapes, g)
            stages.append(hidden[:, 1:])

        maps = [
            m.transpose(1, 2).unflatten(2, s)
            for m, s in zip(stem.split([s * s for s in sides], 1), shapes, strict=True)
        ]
        maps = [c1 + self.upsample(maps[0]), *maps]
        return hidden, [m + self.resized(x, m.shape[-1]) for x, m in zip(stages, maps, strict=True)]

    def resized(self, tokens: Tensor, side: int) -> Tensor:
        """Patch tokens [B, g * g, D] as a map [B, D, side, side]."""
        patches = tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return F.interpolate(patches, size=(side, side), mode="bilinear", align_corners=False)
