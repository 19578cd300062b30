"""New models from base components on disk: a language model, a CLIP and a Stable Diffusion folder.

Weights of components are copied; new parts (adapter, synchronizers, resamplers, projections) are initialised. New
tokens get random embeddings, and head rows that keep them from being generated until they are trained (docs/model.md,
"Language model").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
)

from ..model.config import SD_SCHEDULER, MMInterleavedConfig
from ..model.mm_interleaved import MMInterleavedModel
from .checkpoint import CheckpointError

# Keys in which a component's configuration must agree with the model's.
_TEXT_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
)  # fmt: skip
_VISION_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "hidden_act", "layer_norm_eps",
)  # fmt: skip


def _vision_config(clip: Path) -> CLIPVisionConfig:
    config: Any = AutoConfig.from_pretrained(clip)
    return getattr(config, "vision_config", config)


def _library_config(cls: type, folder: Path, name: str) -> dict[str, Any]:
    """A diffusers configuration without its private keys."""
    config = cls.load_config(folder, subfolder=name)
    return {k: v for k, v in config.items() if not k.startswith("_")}


def config_from_components(
    llm: Path, clip: Path, diffusion: Path, vocab_size: int, **changes: Any
) -> MMInterleavedConfig:
    """The release's configuration with its base models replaced, and every size that depends on them adapted.

    Args:
        llm, clip, diffusion: folders of the components.
        vocab_size: of the tokenizer with the two image tokens, which are its last two ids.
        changes: further keys of the configuration.
    """
    tree = MMInterleavedConfig.preset("release").to_dict()
    text = AutoConfig.from_pretrained(llm)
    vision = _vision_config(clip)
    unet = _library_config(UNet2DConditionModel, diffusion, "unet")
    vae = _library_config(AutoencoderKL, diffusion, "vae")
    scheduler = _library_config(DDPMScheduler, diffusion, "scheduler")
    assert isinstance(vision.image_size, int)
    assert isinstance(vision.patch_size, int)
    grid = vision.image_size // vision.patch_size
    sides = [4 * grid, 2 * grid, grid, grid // 2]
    tree["text_config"] = text.to_dict() | {
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
        "pad_token_id": None,
    }
    tree["vision_config"] = vision.to_dict()
    tree["adapter"]["num_heads"] = vision.num_attention_heads
    tree["mmfs"] |= {"hidden_size": vision.hidden_size, "levels": sides[1:], "base_size": grid}
    decoder = tree["image_decoder"]
    decoder |= {
        "unet": unet,
        "vae": vae,
        "scheduler": SD_SCHEDULER | {k: scheduler[k] for k in SD_SCHEDULER if k in scheduler},
    }
    decoder["image_size"] = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    decoder["resampler"]["hidden_size"] = unet["cross_attention_dim"]
    decoder["mmfs"]["levels"] = sides
    tree["max_context_length"] = text.max_position_embeddings
    tree |= {"soi_token_id": vocab_size - 2, "image_token_id": vocab_size - 1}
    return MMInterleavedConfig(**(tree | changes))


def from_components(
    config: MMInterleavedConfig,
    llm: Path,
    clip: Path,
    diffusion: Path,
    dtype: torch.dtype = torch.float32,
    model_class: type[MMInterleavedModel] = MMInterleavedModel,
) -> MMInterleavedModel:
    """A model with the components' weights.

    Args:
        config: configuration of the model; the components must agree with it.
        llm: a transformers causal language model.
        clip: a CLIP model or its vision tower.
        diffusion: a diffusers folder with `unet`, `vae`, `scheduler`, `tokenizer` and `text_encoder` in it.
        dtype: type of the weights; the VAE stays in float32.
        model_class: class of the result.

    Raises:
        CheckpointError: a component disagrees with the configuration; names the key and both values.
    """
    _check_components(config, llm, clip, diffusion)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = model_class(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        _copy_language_model(model, AutoModelForCausalLM.from_pretrained(llm, dtype=dtype))
        _copy_vision(model, CLIPVisionModel.from_pretrained(clip, dtype=dtype).state_dict())
        unet = UNet2DConditionModel.from_pretrained(diffusion, subfolder="unet", torch_dtype=dtype)
        _load(model.image_decoder.unet, unet.state_dict(), skip="synchronizers.")
        vae = AutoencoderKL.from_pretrained(diffusion, subfolder="vae", torch_dtype=torch.float32)
        model.image_decoder.vae.to(torch.float32)
        _load(model.image_decoder.vae, vae.state_dict())
        model.image_decoder.negative_prompt.weight.copy_(_empty_prompt(diffusion))
    return model.eval()


def _check_components(config: MMInterleavedConfig, llm: Path, clip: Path, diffusion: Path) -> None:
    text, vision = AutoConfig.from_pretrained(llm), _vision_config(clip)
    pairs = [(f"text_config.{k}", getattr(config.text_config, k, None), getattr(text, k, None)) for k in _TEXT_KEYS]
    pairs += [(f"vision_config.{k}", getattr(config.vision_config, k), getattr(vision, k)) for k in _VISION_KEYS]
    parts = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "scheduler": DDPMScheduler}
    for name, cls in parts.items():
        wanted, found = getattr(config.image_decoder, name), _library_config(cls, diffusion, name)
        pairs += [
            (f"image_decoder.{name}.{k}", wanted[k], found[k])
            for k in wanted.keys() & found.keys()
            if k != "sample_size" or name == "unet"  # the VAE's value has no effect
        ]
    wrong = [f"{name} is {a!r}, but the component says {b!r}" for name, a, b in pairs if _as_list(a) != _as_list(b)]
    kept = config.vocab_size - config.num_new_tokens
    if text.vocab_size < kept:
        wrong.append(
            f"the vocabulary has {kept} tokens besides the new ones, but the component's only {text.vocab_size}"
        )
    if wrong:
        raise CheckpointError("the components do not fit the configuration: " + "; ".join(wrong))


def _as_list(value: Any) -> Any:
    """The value, a tuple as a list: JSON has lists only."""
    return list(value) if isinstance(value, tuple) else value


def _load(module: torch.nn.Module, weights: dict[str, Tensor], skip: str | None = None) -> None:
    """Copy weights; every parameter must get one, except those whose names start with `skip`."""
    missing, unexpected = module.load_state_dict(weights, strict=False)
    missing = [name for name in missing if skip is None or not name.startswith(skip)]
    if missing or unexpected:
        raise CheckpointError(f"a component lacks {missing[:3]} or has {unexpected[:3]} too many")


def _copy_language_model(model: MMInterleavedModel, llm: PreTrainedModel) -> None:
    kept = model.config.vocab_size - model.config.num_new_tokens
    weights = llm.base_model.state_dict()
    table = model.language_model.embed_tokens.weight
    table[:kept] = weights["embed_tokens.weight"][:kept]
    torch.nn.init.normal_(table[kept:], std=0.02)
    weights["embed_tokens.weight"] = table
    missing, unexpected = model.language_model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if ".synchronizer." not in name]
    if missing or unexpected:
        raise CheckpointError(f"the language model lacks {missing[:3]} or has {unexpected[:3]} too many")
    head = model.lm_head.head
    head.weight.zero_()
    output = llm.get_output_embeddings()
    assert output is not None  # a causal language model has a head
    head.weight[:kept] = output.weight[:kept]


def _copy_vision(model: MMInterleavedModel, weights: dict[str, Tensor]) -> None:
    renamed = {}
    for name, tensor in weights.items():
        name = name.removeprefix("vision_model.").replace("pre_layrnorm.", "pre_layernorm.")
        if not name.startswith("post_layernorm."):  # the release does not use it
            renamed[name.removeprefix("encoder.")] = tensor
    encoder = model.visual_tokenizer.encoder
    wanted = {n for n in encoder.state_dict() if n.startswith(("embeddings.", "pre_layernorm.", "layers."))}
    if wanted != set(renamed):
        raise CheckpointError(f"CLIP differs in {sorted(wanted ^ set(renamed))[:5]}")
    encoder.load_state_dict(renamed, strict=False)


def _empty_prompt(diffusion: Path) -> Tensor:
    """The output of the diffusion model's text encoder for an empty prompt: [1, tokens, width]."""
    tokenizer = CLIPTokenizer.from_pretrained(diffusion, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(diffusion, subfolder="text_encoder")
    length = encoder.config.max_position_embeddings
    ids = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return encoder(ids).last_hidden_state
