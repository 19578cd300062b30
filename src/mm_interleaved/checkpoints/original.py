"""The original release's format: its parameter names, its configuration and its derivable tables.

`NameTable.ours` and `NameTable.theirs` translate parameter names. `derived_tensors` computes the tensors that the
original stores although they follow from the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..model.config import SD_SCHEDULER, MMInterleavedConfig
from ..model.positions import sincos_2d
from ..model.visual_tokenizer import CLIP_MEAN, CLIP_STD

# ours -> theirs; {n} is a layer number, {x} the rest of the name. The first line that fits decides.
_RESAMPLER = [
    ("queries", "queries"),
    ("norm.{x}", "blip2qformer.layernorm.{x}"),
    *[
        (f"layers.{{n}}.{a}.{p}_proj.{{x}}", f"blip2qformer.encoder.layer.{{n}}.{b}.attention.{q}.{{x}}")
        for a, b in (("self_attention", "attention"), ("cross_attention", "crossattention"))
        for p, q in (("q", "query"), ("k", "key"), ("v", "value"))
    ],
    *[
        (f"layers.{{n}}.{a}.{p}.{{x}}", f"blip2qformer.encoder.layer.{{n}}.{b}.{q}.{{x}}")
        for a, b in (("self_attention", "attention"), ("cross_attention", "crossattention"))
        for p, q in (
            ("q_norm", "attention.q_norm"),
            ("k_norm", "attention.k_norm"),
            ("out_proj", "output.dense"),
            ("norm", "output.LayerNorm"),
        )
    ],
    ("layers.{n}.fc1.{x}", "blip2qformer.encoder.layer.{n}.intermediate_query.dense.{x}"),
    ("layers.{n}.fc2.{x}", "blip2qformer.encoder.layer.{n}.output_query.dense.{x}"),
    ("layers.{n}.norm.{x}", "blip2qformer.encoder.layer.{n}.output_query.LayerNorm.{x}"),
]
_EXTRACTOR = [
    ("query_norm.{x}", "query_norm.{x}"),
    ("feature_norm.{x}", "feat_norm.{x}"),
    ("attention.{x}", "attn.{x}"),
    ("mlp_norm.{x}", "ffn_norm.{x}"),
    ("mlp.conv.{x}", "ffn.dwconv.dwconv.{x}"),
    ("mlp.{x}", "ffn.{x}"),
    ("gamma", "gamma"),
]
_VIT = [
    ("embeddings.{x}", "embeddings.{x}"),
    ("pre_layernorm.{x}", "pre_layrnorm.{x}"),
    ("layers.{x}", "encoder.layers.{x}"),
    ("level_embed", "adapter_level_embed"),
    ("spatial_prior.{x}", "adapter_spm.{x}"),
    ("upsample.{x}", "adapter_up.{x}"),
    *[
        (f"interactions.{{n}}.{part}.{a}", f"adapter_interactions.{{n}}.{part}.{b}")
        for part in ("injector", "extractor", "extra_extractors.{n}")
        for a, b in _EXTRACTOR
    ],
]
_UNET_SYNCHRONIZER = [
    ("query_norm.{x}", "query_norm.{x}"),
    ("feature_norm.{x}", "feat_norm.{x}"),
    ("mmfs.{x}", "mmfs.{x}"),
    ("conv.{x}", "conv.{x}"),
]


def _under(ours: str, theirs: str, rules: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in rules]


def _rules(num_synchronizers: int) -> list[tuple[str, str]]:
    """All translations; the UNet's last synchronizer is the mid block's."""
    mid = num_synchronizers - 1
    unet, mmfs = "image_decoder.unet", "image_decoder.decoder.mmfs_module"
    return [
        ("soi_token.weight", "soi_token"),
        *_under("visual_tokenizer.encoder", "visual_tokenizer.encoder.vision_model", _VIT),
        *_under("visual_tokenizer.resampler", "visual_tokenizer.perceiver_resampler", _RESAMPLER),
        ("visual_tokenizer.pos_proj.{x}", "visual_tokenizer.pos_proj.{x}"),
        ("visual_tokenizer.pos_norm.{x}", "visual_tokenizer.pos_ln.{x}"),
        ("visual_tokenizer.post_norm.{x}", "visual_tokenizer.post_ln.{x}"),
        ("visual_tokenizer.proj.{x}", "visual_tokenizer.proj.{x}"),
        ("language_model.layers.{n}.synchronizer.gate", "mm_decoder.layers.{n}.llama_cross_attn.gate"),
        ("language_model.layers.{n}.synchronizer.query_norm.{x}", "mm_decoder.layers.{n}.llama_cross_attn.norm1.{x}"),
        ("language_model.layers.{n}.synchronizer.feature_norm.{x}", "mm_decoder.layers.{n}.llama_cross_attn.norm2.{x}"),
        ("language_model.layers.{n}.synchronizer.mmfs.{x}", "mm_decoder.layers.{n}.llama_cross_attn.attn.{x}"),
        ("language_model.{x}", "mm_decoder.{x}"),
        ("lm_head.head.{x}", "text_decoder.head.{x}"),
        ("lm_head.new.{x}", "text_decoder.head_new.{x}"),
        *_under("image_decoder.resampler", "image_decoder.perceiver_resampler", _RESAMPLER),
        ("image_decoder.negative_prompt.weight", "image_decoder.neg_prompt_embeds"),
        *_under(f"{unet}.synchronizers.{mid}", f"{mmfs}.mmfs_mid_block", _UNET_SYNCHRONIZER),
        *_under(f"{unet}.synchronizers.{{n}}", f"{mmfs}.mmfs_down_blocks.{{n}}", _UNET_SYNCHRONIZER),
        (f"{unet}.{{x}}", "image_decoder.decoder.unet.{x}"),
        ("image_decoder.vae.{x}", "image_decoder.decoder.vae.{x}"),
        ("context_proj.{x}", "context_feat_proj.{x}"),
    ]


def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{n\}", r"(\d+)").replace(r"\{x\}", "(.+)")
    return re.compile(pattern)


class NameTable:
    """Translates parameter names between this project and the original release."""

    def __init__(self, config: MMInterleavedConfig) -> None:
        rules = _rules(len(config.image_decoder.skip_shapes()))
        self._to_theirs = [(_compile(a), b) for a, b in rules]
        self._to_ours = [(_compile(b), a) for a, b in rules]

    @staticmethod
    def _translate(name: str, table: list[tuple[re.Pattern[str], str]]) -> str | None:
        for pattern, template in table:
            if match := pattern.fullmatch(name):
                parts = iter(match.groups())
                return re.sub(r"\{[nx]\}", lambda _, parts=parts: next(parts), template)
        return None

    def theirs(self, name: str) -> str | None:
        """The original's name of our parameter `name`; None if it has none."""
        return self._translate(name, self._to_theirs)

    def ours(self, name: str) -> str | None:
        """Our name of the original's parameter `name`; None if we have none."""
        return self._translate(name, self._to_ours)


def derived_tensors(config: MMInterleavedConfig) -> dict[str, Callable[[], Tensor]]:
    """Tensors that the original stores although the configuration determines them: names, and how to compute them."""
    width, grid, decoder = config.vision_config.hidden_size, config.grid_size, config.image_decoder

    def visual_positions() -> Tensor:
        table = torch.from_numpy(sincos_2d(grid, width))
        return torch.cat([torch.zeros_like(table[:1]), table])

    derived: dict[str, Callable[[], Tensor]] = {
        "visual_tokenizer.pos_embed": visual_positions,
        "visual_tokenizer.clip_mean": lambda: torch.tensor(CLIP_MEAN).view(1, 3, 1, 1),
        "visual_tokenizer.clip_std": lambda: torch.tensor(CLIP_STD).view(1, 3, 1, 1),
        "visual_tokenizer.encoder.vision_model.embeddings.position_ids": lambda: torch.arange(grid * grid + 1)[None],
    }
    shapes = decoder.skip_shapes()
    for index, (channels, _) in enumerate(shapes):
        block = "mmfs_mid_block" if index == len(shapes) - 1 else f"mmfs_down_blocks.{index}"
        derived[f"image_decoder.decoder.mmfs_module.{block}.pos_embed"] = lambda channels=channels: torch.from_numpy(
            sincos_2d(decoder.latent_size, channels)
        )
    return derived


def _resampler(perceiver: dict[str, Any]) -> dict[str, Any]:
    """The settings of a resampler of the original, with the defaults of its library (BERT)."""
    return {
        "num_queries": perceiver["num_queries"],
        "hidden_size": perceiver.get("hidden_size", 768),
        "num_layers": perceiver.get("num_hidden_layers", 12),
        "num_heads": perceiver.get("num_attention_heads", 12),
        "intermediate_size": perceiver.get("intermediate_size", 3072),
        "cross_attention_every": perceiver.get("cross_attention_frequency", 2),
        "qk_norm": perceiver.get("qk_normalization", False),
        "hidden_dropout": perceiver.get("hidden_dropout_prob", 0.1),
        "attention_dropout": perceiver.get("attention_probs_dropout_prob", 0.1),
    }


def config_from_original(description: dict[str, Any]) -> MMInterleavedConfig:
    """Our configuration of a model of the original.

    Args:
        description: `model`, the keyword arguments of the original's model, and the configurations of its base models
            `llama`, `clip_vision`, `unet`, `vae` and `scheduler`.

    Raises:
        ValueError: a part is missing.
    """
    missing = [key for key in ("model", "llama", "clip_vision", "unet", "vae", "scheduler") if key not in description]
    if missing:
        raise ValueError(f"the description of the original's model lacks {', '.join(missing)}")
    if not description["model"]["visual_tokenizer_config"].get("clip_normalize", True):
        raise ValueError(
            "clip_normalize=False is not supported; released models normalise images with CLIP's constants"
        )
    model, clip, vae = description["model"], description["clip_vision"], dict(description["vae"])
    decoder, tokens = model["image_decoder_config"], model["special_token_dict"]
    text = {"model_type": "llama", **description["llama"], "vocab_size": model["txt_vocab_size"]}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text.pop(key, None)
    blocks = len(vae["block_out_channels"])
    vae.setdefault("down_block_types", ["DownEncoderBlock2D"] * blocks)
    vae.setdefault("up_block_types", ["UpDecoderBlock2D"] * blocks)
    grid = clip["image_size"] // clip["patch_size"]
    feature_size, width = model["image_embed_dim"], text["hidden_size"]
    return MMInterleavedConfig(
        text_config=text,
        vision_config=clip,
        adapter={"num_heads": clip["num_attention_heads"]},
        visual_resampler=_resampler(model["visual_tokenizer_config"]["perceiver_config"]),
        mmfs={
            "hidden_size": int(width * (feature_size / width)),
            "levels": sorted(model["spatial_shapes"], reverse=True),
            "base_size": 16,
        },
        image_decoder={
            "image_size": decoder["image_size"],
            "unet": dict(description["unet"]),
            "vae": vae,
            "scheduler": SD_SCHEDULER | {k: v for k, v in description["scheduler"].items() if k in SD_SCHEDULER},
            "resampler": _resampler(decoder["perceiver_config"]),
            "mmfs": {
                "hidden_size": 1024, "levels": [4 * grid, 2 * grid, grid, grid // 2], "max_images": 10,
                "offset_init": 1.0,
            },
            "unconditional_probability": decoder.get("uncond_prob", 0.1),
            "vae_batch_size": decoder.get("vae_encode_mini_bs", 32),
        },
        mmfs_every=model["cross_attention_frequency"],
        max_context_length=model["seq_len"],
        loss_text_weight=model.get("loss_txt_weight", 1.0),
        loss_image_weight=model.get("loss_img_weight", 10.0),
        num_new_tokens=model["txt_vocab_size"] - description["llama"]["vocab_size"],
        **{f"{name}_token_id": tokens[f"{name}_token_id"] for name in ("bos", "eos", "pad", "soi", "image")},
    )  # fmt: skip
