"""Stable Diffusion's UNet with synchronizers: its skip connections and its middle attend to earlier images by MMFS.

Axes: B batch of images that are generated, I earlier images, S spatial positions of all levels, N heads, D channels of
a head, C channels, R slots for earlier images, L tokens.

The down path and the middle run as in diffusers. Then every skip tensor and the middle's output pass a synchronizer, a
residual with a zero-initialised 1x1 convolution. Then the up path runs. So the down path does not depend on earlier
images. On a CUDA device maps stay in channels-last memory format (`ops/group_norm.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from ..ops import channels_last
from ..ops.deformable import Shapes
from .config import ImageDecoderConfig
from .diffusion_blocks import ResnetBlock, norm_and_activation, use_own_blocks
from .mmfs import MMFS, DerivedOutput, DerivedQuery, VisibleImages
from .positions import PositionTable
from .typed_modules import module_list
from .vit_adapter import cell_centres
from .weights import is_intercepted, is_plain, plain_class

_EPS = 1e-6  # of all LayerNorms here


@dataclass
class EarlierImages:
    """The earlier images that the UNet attends to.

    Attributes:
        features: [I, S, vision width], all four levels one after the other.
        normed: the same, each vector with mean 0 and variance 1: the part of a LayerNorm that all synchronizers share.
        shapes: (height, width) of every level.
        visible: the earlier images of each image of the batch; a group is one image.
        values: for every synchronizer its values of the images; None: projected in each call (training).
        centres: by side of a map of the UNet, the reference points [1, side * side, 2] of its cells; None: computed in
            each call.
    """

    features: Tensor
    normed: Tensor
    shapes: Shapes
    visible: VisibleImages
    values: list[Tensor] | None = None
    centres: dict[int, Tensor] | None = None

    @classmethod
    def build(cls, pyramid: list[Tensor], images: Tensor) -> EarlierImages:
        """From maps [I, width, side, side] and the earlier images of each image [B, R], -1 = none."""
        return cls.of(pyramid, VisibleImages.build(images, len(pyramid[0])))

    @classmethod
    def of(cls, pyramid: list[Tensor], visible: VisibleImages) -> EarlierImages:
        """From maps [I, width, side, side] and the earlier images of each image, as `VisibleImages`."""
        features = torch.cat([m.flatten(2).transpose(1, 2) for m in pyramid], dim=1)
        normed = F.layer_norm(features, features.shape[-1:], eps=_EPS)
        return cls(features, normed, [(m.shape[-2], m.shape[-1]) for m in pyramid], visible)

    def for_guidance(self, unconditional_sees: bool) -> EarlierImages:
        """For a batch that starts with the unconditional copies of all images; features are not copied."""
        images = self.visible.images
        unconditional = images if unconditional_sees else torch.full_like(images, -1)
        visible = VisibleImages.build(torch.cat([unconditional, images]), len(self.features))
        return replace(self, visible=visible)


@plain_class
class LearnedNorm(nn.LayerNorm):
    """The gain and bias of a LayerNorm, for vectors that are normalised already."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., width]."""
        return input * self.weight + self.bias


@dataclass
class DerivedWeights:
    """Derived weights of a synchronizer for one generation call; None: its modules are called instead.

    Attributes:
        query: the query maps as one linear layer.
        output: the output projection and the convolution after it as one linear layer.
    """

    query: DerivedQuery | None
    output: DerivedOutput | None


class UNetSynchronizer(GradientCheckpointingLayer):
    """x + conv(MMFS(norm(x) + positions, norm(maps)))."""

    def __init__(self, config: ImageDecoderConfig, channels: int, side: int, feature_size: int) -> None:
        super().__init__()
        self.side = side
        self.query_norm = nn.LayerNorm(channels, eps=_EPS)
        self.feature_norm = LearnedNorm(feature_size, eps=_EPS)
        self.positions = PositionTable.grid(config.latent_size, channels, resize_to=side)
        self.mmfs = MMFS(config.mmfs, channels, feature_size)
        self.conv = nn.Conv2d(channels, channels, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """MMFS has PyTorch's default weights in its query maps here; the convolution starts at zero."""
        for linear in (self.mmfs.dynamic_offset_mask, self.mmfs.attention_weights):
            bound = linear.in_features**-0.5
            nn.init.uniform_(linear.weight, -bound, bound)
        nn.init.zeros_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def project(self, normed: Tensor) -> Tensor:
        """The values [I, S, N, D] of `EarlierImages.normed` [I, S, width]."""
        return self.mmfs.project(self.feature_norm(normed))

    def derive(self, out: DerivedWeights | None = None) -> DerivedWeights:
        """The derived weights, from the current weights; written into `out` if it is given."""
        out = out or DerivedWeights(None, None)
        output = None
        if is_plain(self.conv) and not is_intercepted(self.mmfs):  # a hook on MMFS must get its own output
            output = self.mmfs.derive_output(self.conv.weight[:, :, 0, 0], self.conv.bias, out.output)
        return DerivedWeights(self.mmfs.derive_query(out.query), output)

    def empty(self) -> DerivedWeights:
        """Empty tensors for `derive` to write into."""
        return DerivedWeights(self.mmfs.empty_query(), self.mmfs.empty_output(self.conv.weight))

    def forward(
        self,
        x: Tensor,
        earlier: EarlierImages,
        values: Tensor | None,
        centres: Tensor,
        derived: DerivedWeights | None = None,
    ) -> Tensor:
        """`x` [B, C, side, side] around `centres`; a group of `earlier.visible` is one image of the batch.

        `values` are `project(earlier.normed)` (None: computed here), `derived` is `derive()` (None: not used).
        """
        derived = derived or DerivedWeights(None, None)
        if earlier.visible.images.shape[1] == 0:  # no image has an earlier one: the same vector in every cell
            query = x.new_zeros(1, 1, x.shape[1])
        else:
            query = self.query_norm(x.flatten(2).transpose(1, 2)) + self.positions().to(x.dtype)
        values = self.project(earlier.normed) if values is None else values
        seen = self.mmfs(
            query, values, earlier.visible, earlier.shapes, centres, self.mmfs.config.base_size or self.side,
            derived.query, derived.output,
        )  # fmt: skip
        seen = seen.transpose(1, 2).unflatten(2, (self.side, self.side) if seen.shape[1] > 1 else (1, 1))
        done = derived.output is not None and self.mmfs.implementation == "fast"  # the convolution is included
        return x + (seen if done else self.conv(seen))


TextKV = dict[str, tuple[Tensor, Tensor]]  # keys and values [B, N, L, D] by name of the attention


class TextKVProcessor(AttnProcessor2_0):
    """diffusers' attention, which also accepts projected keys and values of the text.

    Args:
        name: name of the attention, the key of its keys and values.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        text: TextKV | None = None,
    ) -> Tensor:
        """`hidden_states` [B, cells, C]; other arguments as in diffusers."""
        if text is None or self.name not in text:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        assert attn.to_out is not None
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, *text[self.name]).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](mixed)) / attn.rescale_output_factor


class MMFSUNet(UNet2DConditionModel):
    """A diffusers UNet of the Stable Diffusion family with a synchronizer on each skip connection and on the middle."""

    def __init__(self, config: ImageDecoderConfig, feature_size: int) -> None:
        super().__init__(**config.unet)
        unsupported = {
            "class_embed_type": None, "addition_embed_type": None, "encoder_hid_dim_type": None,
            "center_input_sample": False, "time_cond_proj_dim": None,
        }  # fmt: skip
        for key, value in unsupported.items():
            if self.config[key] != value:
                raise ValueError(
                    f"config: image_decoder.unet.{key}={self.config[key]!r} is not supported; it must be {value!r}"
                )
        self.synchronizers = module_list(
            [UNetSynchronizer(config, channels, side, feature_size) for channels, side in config.skip_shapes()]
            if config.mmfs.enabled
            else []
        )
        self.set_attn_processor({name: TextKVProcessor(name) for name in self.attn_processors})
        use_own_blocks(self)
        blocks = [m for m in self.modules() if isinstance(m, ResnetBlock)]
        self.silu_before_blocks = all(block.activates_time for block in blocks)
        if self.silu_before_blocks:  # computed once for all blocks
            for block in blocks:
                block.skip_time_act = True

    def prepare(self, earlier: EarlierImages) -> EarlierImages:
        """`earlier` with the values of every synchronizer, so that steps need not project them."""
        values = [synchronizer.project(earlier.normed) for synchronizer in self.synchronizers]
        return replace(earlier, values=values, centres=self._centres(earlier.features.device))

    def derive(self, out: list[DerivedWeights] | None = None) -> list[DerivedWeights]:
        """The derived weights of every synchronizer, written into `out` if it is given; rebuilt for each image."""
        places = [None] * len(self.synchronizers) if out is None else out
        return [s.derive(place) for s, place in zip(self.synchronizers, places, strict=True)]

    def _centres(self, device: torch.device) -> dict[int, Tensor]:
        """See `EarlierImages.centres`."""
        sides = {synchronizer.side for synchronizer in self.synchronizers}
        return {side: cell_centres([side], device)[None] for side in sides}

    def prepare_text(self, conditions: Tensor) -> TextKV:
        """Keys and values of `conditions` [B, L, cross_attention_dim], the same for all steps."""
        kept: TextKV = {}
        for name, module in self.named_modules():
            if isinstance(module, Attention) and module.is_cross_attention:
                assert module.to_k is not None
                assert module.to_v is not None
                both = (linear(conditions).unflatten(-1, (module.heads, -1)) for linear in (module.to_k, module.to_v))
                key, value = (x.transpose(1, 2) for x in both)
                kept[f"{name}.processor"] = (key, value)
        return kept

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # earlier images; none of diffusers' options
        self,
        sample: Tensor,
        timestep: Tensor,
        conditions: Tensor,
        earlier: EarlierImages | None,
        text: TextKV | None = None,
        derived: list[DerivedWeights] | None = None,
    ) -> Tensor:
        """Predict the noise.

        Args:
            sample: [B, latent channels, side, side].
            timestep: [B] or a scalar.
            conditions: [B, L, cross_attention_dim].
            earlier: the earlier images; None: the plain UNet.
            text: `prepare_text(conditions)`; None: projected in this call.
            derived: `derive()`; None: the synchronizers' modules.

        Returns:
            [B, latent channels, side, side].
        """
        time = self.time_embedding(self.get_time_embed(sample=sample, timestep=timestep))
        time = F.silu(time) if self.silu_before_blocks else time
        sample = self.conv_in(channels_last(sample))
        skips = [sample]
        projected = None if text is None else {"text": text}
        crossing = {"encoder_hidden_states": conditions, "cross_attention_kwargs": projected}
        for block in self.down_blocks:
            extra = crossing if getattr(block, "has_cross_attention", False) else {}
            sample, outputs = block(hidden_states=sample, temb=time, **extra)
            skips += outputs
        sample = self.mid_block(sample, time, **crossing)

        if earlier is not None and len(self.synchronizers):
            nothing = [None] * len(self.synchronizers)
            values, maps = earlier.values or nothing, derived or nothing
            centres = earlier.centres or self._centres(sample.device)
            each = zip(self.synchronizers, [*skips, sample], values, maps, strict=True)
            *skips, sample = (module(x, earlier, v, centres[module.side], d) for module, x, v, d in each)

        for block in self.up_blocks:
            count = len(cast(nn.ModuleList, block.resnets))
            skips, taken = skips[:-count], tuple(skips[-count:])
            extra = crossing if getattr(block, "has_cross_attention", False) else {}
            sample = block(hidden_states=sample, temb=time, res_hidden_states_tuple=taken, **extra)
        assert self.conv_norm_out is not None
        assert self.conv_act is not None
        return self.conv_out(norm_and_activation(self.conv_norm_out, self.conv_act, sample))
