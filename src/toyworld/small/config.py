"""The small model's shape, and the sizes that its comparisons change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mm_interleaved.model.config import PRESETS, MMInterleavedConfig

Arm = Literal["both", "llm", "unet", "none"]  # the parts with MMFS


@dataclass(frozen=True)
class Shape:
    """What comparisons change of the preset `small`.

    Attributes:
        image_tokens: visual tokens of an image.
        conditions: tokens that the UNet is conditioned on.
        vae: channels of the autoencoder by level; the latents have 1 / 2^(levels - 1) of the image's side.
        vae_layers: blocks of a level of the autoencoder.
        latents: their channels.
        unet: channels by level.
        crossing: by level, whether there are transformer blocks.
        layers: blocks of a level of the UNet.
        head: channels of an attention head of the UNet.
        text, text_layers, text_inner: width, layers and inner width of the language model.
        conditions_width: of a condition.
        stem: channels of the adapter's stem.
        extractors: extractors after the adapter's last interaction, beside the four.
        vision_layers: of the vision tower.
        mmfs_levels: maps that the language model looks into.
        mmfs_every: every how many layers it does.
        zero_snr: whether the last timestep is noise alone (arXiv 2305.08891), and generation begins with it.
    """

    image_tokens: int = 16
    conditions: int = 16
    vae: list[int] = field(default_factory=lambda: [32, 64, 96, 96])
    vae_layers: int = 1
    latents: int = 16
    unet: list[int] = field(default_factory=lambda: [96, 96, 64])
    crossing: list[bool] = field(default_factory=lambda: [True, True, True])
    layers: int = 1
    head: int = 32
    text: int = 192
    text_layers: int = 8
    text_inner: int = 480
    conditions_width: int = 128
    stem: int = 16
    extractors: int = 2
    vision_layers: int = 8
    mmfs_levels: list[int] = field(default_factory=lambda: [16, 8, 4])
    mmfs_every: int = 4
    zero_snr: bool = True

    def tree(self, arm: Arm = "both") -> dict[str, Any]:
        """The configuration as plain data; `arm` names the parts with MMFS."""
        tree = PRESETS["small"]()
        tree["text_config"] |= {
            "hidden_size": self.text, "intermediate_size": self.text_inner, "num_hidden_layers": self.text_layers,
            "num_attention_heads": self.text // 32,
            "initializer_range": 0.05,
        }  # fmt: skip
        tree["vision_config"] |= {"num_hidden_layers": self.vision_layers}
        tree["adapter"] |= {"stem_channels": self.stem, "num_extra_extractors": self.extractors}
        tree["visual_resampler"] |= {"num_queries": self.image_tokens}
        tree["mmfs"] |= {"levels": list(self.mmfs_levels), "enabled": arm in ("both", "llm")}
        tree |= {"mmfs_every": self.mmfs_every, "isolate_documents": True, "loss_image_weight": 5.0,
                 "normalize_image_loss": True}  # fmt: skip
        decoder, side = tree["image_decoder"], 128 >> (len(self.vae) - 1)
        decoder["vae"] |= {
            "block_out_channels": list(self.vae), "latent_channels": self.latents,
            "layers_per_block": self.vae_layers, "mid_block_add_attention": False,
            "down_block_types": ["DownEncoderBlock2D"] * len(self.vae),
            "up_block_types": ["UpDecoderBlock2D"] * len(self.vae),
        }  # fmt: skip
        decoder["unet"] |= {
            "sample_size": side, "in_channels": self.latents, "out_channels": self.latents,
            "block_out_channels": list(self.unet), "layers_per_block": self.layers,
            "down_block_types": ["CrossAttnDownBlock2D" if x else "DownBlock2D" for x in self.crossing],
            "up_block_types": ["CrossAttnUpBlock2D" if x else "UpBlock2D" for x in reversed(self.crossing)],
            "attention_head_dim": [max(1, width // self.head) for width in self.unet],  # diffusers means heads
            "cross_attention_dim": self.conditions_width,
        }  # fmt: skip
        decoder["mmfs"] |= {"enabled": arm in ("both", "unet")}
        decoder["scheduler"] |= self.schedule()
        decoder["resampler"] |= {"num_queries": self.conditions, "hidden_size": self.conditions_width}
        return tree

    def schedule(self) -> dict[str, Any]:
        """Settings of the noise schedule; they may change between two stages."""
        spacing = "trailing" if self.zero_snr else "leading"
        return {"rescale_betas_zero_snr": self.zero_snr, "timestep_spacing": spacing}

    def config(self, arm: Arm = "both") -> MMInterleavedConfig:
        """The model's configuration."""
        return MMInterleavedConfig(**self.tree(arm))
