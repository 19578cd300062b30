"""The model and the processor that a run trains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..checkpoints.components import config_from_components, from_components
from ..generation import MMInterleaved
from ..io import read_json
from ..model import MMInterleavedConfig
from ..processor import MMInterleavedProcessor, MMInterleavedTokenizer
from ..processor.tokenizer import add_image_tokens
from .config import ModelConfig, TrainConfig

VISION, LANGUAGE = "visual_tokenizer.safetensors", "language.safetensors"  # files of parts, see `model` in TrainConfig


def build(config: TrainConfig, default_tokenizer: Path | None = None) -> tuple[MMInterleaved, MMInterleavedProcessor]:
    """Model and processor.

    Trainable weights are float32; frozen ones have the type that the run computes in, the VAE its own.

    Raises:
        ValueError: the settings do not fit together, or a folder holds something else.
    """
    source = config.model
    tokenizer = _tokenizer(source, default_tokenizer)
    model_config = _model_config(source, tokenizer)
    model_config.loss_text_weight, model_config.loss_image_weight = config.losses.text, config.losses.image
    model_config.normalize_image_loss = config.losses.normalize_image_loss
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = _model(source, model_config)
    if source.vae is not None:
        load_vae(model.image_decoder.vae, Path(source.vae))
    if source.vision is not None:
        load_vision(model.visual_tokenizer, source.vision)
    if source.language is not None:
        load_language(model, source.language)
    if source.unet is not None:
        load_unet(model, source.unet)
    set_types(model, config)
    return model, MMInterleavedProcessor.for_model(model_config, tokenizer)


def build_config(source: ModelConfig, default_tokenizer: Path | None = None) -> MMInterleavedConfig:
    """The configuration alone.

    Raises:
        ValueError: the settings do not fit together, or a folder holds something else.
    """
    return _model_config(source, _tokenizer(source, default_tokenizer))


def build_tokenizer(source: ModelConfig, default_tokenizer: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer alone, with the tokens of images.

    Raises:
        ValueError: a folder holds something else.
    """
    tokenizer = _tokenizer(source, default_tokenizer)
    add_image_tokens(tokenizer)
    return tokenizer


def build_processor(source: ModelConfig, default_tokenizer: Path | None = None) -> MMInterleavedProcessor:
    """The processor alone, without weights; a VAE need not be there yet.

    Raises:
        ValueError: the settings do not fit together, or a folder holds something else.
    """
    tokenizer = _tokenizer(source, default_tokenizer)
    return MMInterleavedProcessor.for_model(_model_config(replace(source, vae=None), tokenizer), tokenizer)


def set_types(model: MMInterleaved, config: TrainConfig) -> None:
    """float32 for what is trained, the computing type for what is frozen, `losses.vae_dtype` for the VAE."""
    frozen, vae = getattr(torch, config.precision), getattr(torch, config.losses.vae_dtype)
    for name, parameter in model.named_parameters():
        dtype = vae if name.startswith("image_decoder.vae.") else frozen
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def _tokenizer(source: ModelConfig, default: Path | None) -> PreTrainedTokenizerBase:
    if source.tokenizer is not None:
        folder = Path(source.tokenizer)
    elif source.checkpoint is not None:
        folder = Path(source.checkpoint)
    elif source.components is not None:
        folder = Path(source.components.llm)
    elif default is not None and source.preset != "release":
        folder = default
    else:
        raise ValueError("model.tokenizer must name the folder of a tokenizer")
    if not folder.exists():
        raise ValueError(f"the tokenizer's folder '{folder}' does not exist")
    try:
        if (folder / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(folder)
        return MMInterleavedTokenizer.from_vocab(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"'{folder}' holds no tokenizer: {str(error).splitlines()[0]}") from None


def _model_config(source: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> MMInterleavedConfig:
    """The configuration, with everything that the tokenizer, the VAE and the overrides change."""
    soi, image = add_image_tokens(tokenizer)
    if source.components is not None:
        parts = source.components
        base = config_from_components(Path(parts.llm), Path(parts.clip), Path(parts.diffusion), len(tokenizer))
    elif source.checkpoint is not None:
        base = MMInterleavedConfig.from_pretrained(source.checkpoint)
    else:
        base = MMInterleavedConfig.preset(str(source.preset))
    tree = base.to_dict()
    if source.preset is not None:
        tree["text_config"]["vocab_size"] = len(tokenizer)
        tree |= {"soi_token_id": soi, "image_token_id": image}
        tree |= {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    _merge(tree, source.overrides, "model.overrides")
    if source.vae is not None:
        tree["image_decoder"]["vae"] = _vae_config(Path(source.vae))
    if not source.mmfs.llm:
        tree["mmfs"]["enabled"] = False
    if not source.mmfs.unet:
        tree["image_decoder"]["mmfs"]["enabled"] = False
    _follow_vae(tree["image_decoder"])
    return MMInterleavedConfig(**tree)


def _merge(tree: dict[str, Any], changes: Mapping[str, Any], where: str) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value, f"{where}.{key}")
        elif key not in tree and where == "model.overrides":
            raise ValueError(f"{where}: the model's configuration has no key '{key}'; it has {', '.join(sorted(tree))}")
        else:
            tree[key] = value


def _vae_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model.vae: '{folder}' has no config.json; give the folder of a diffusers VAE")
    return {k: v for k, v in read_json(path, dict).items() if not k.startswith("_")}


def _follow_vae(decoder: dict[str, Any]) -> None:
    """The UNet's channels and size follow the VAE's."""
    vae = decoder["vae"]
    decoder["unet"] |= {
        "in_channels": vae["latent_channels"],
        "out_channels": vae["latent_channels"],
        "sample_size": decoder["image_size"] // 2 ** (len(vae["block_out_channels"]) - 1),
    }


def _model(source: ModelConfig, config: MMInterleavedConfig) -> MMInterleaved:
    if source.components is not None:
        parts = source.components
        folders = (Path(parts.llm), Path(parts.clip), Path(parts.diffusion))
        return cast(MMInterleaved, from_components(config, *folders, torch.float32, MMInterleaved))
    if source.checkpoint is None:
        return MMInterleaved(config)
    if source.mmfs.llm and source.mmfs.unet and not source.fresh:
        return MMInterleaved.from_pretrained(source.checkpoint, config=config, dtype=torch.float32)
    whole = config.to_dict()  # the checkpoint's synchronizers have to go somewhere to be left out
    whole["mmfs"]["enabled"] = whole["image_decoder"]["mmfs"]["enabled"] = True
    given = MMInterleaved.from_pretrained(
        source.checkpoint, config=MMInterleavedConfig(**whole), dtype=torch.float32
    ).state_dict()  # fmt: skip
    model = MMInterleaved(config)
    own = model.state_dict()
    fresh = fresh_names(list(own), source.fresh)
    model.load_state_dict({name: own[name] if name in fresh else given[name] for name in own})
    return model


def fresh_names(names: list[str], patterns: list[str]) -> set[str]:
    """Those of `names` in which one of `patterns` is found.

    Raises:
        ValueError: a pattern is no regular expression, or fits no name.
    """
    found = set()
    for text in patterns:
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise ValueError(f"model.fresh: '{text}' is not a regular expression: {error}") from None
        fitting = {name for name in names if pattern.search(name)}
        if not fitting:
            raise ValueError(f"model.fresh: the pattern '{text}' fits no parameter of the model")
        found |= fitting
    return found


def given_model(source: ModelConfig, config: MMInterleavedConfig) -> MMInterleaved | None:
    """The model that a part is taken from; None where `source` names a preset, whose weights are fresh anyway."""
    return None if source.preset is not None else _model(source, config)


def load_vae(vae: nn.Module, folder: Path) -> None:
    """Copy the weights of a diffusers VAE folder."""
    vae.load_state_dict(AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).state_dict())


def load_unet(model: MMInterleaved, folder: str) -> None:
    """Copy the UNet of another model, without synchronizers if `model` has none.

    Raises:
        ValueError: the folder holds no model, or one whose UNet has another shape.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"model.unet: '{folder}' is not the folder of a model")
    given = MMInterleaved.from_pretrained(folder, dtype=torch.float32).image_decoder.unet.state_dict()
    unet = model.image_decoder.unet
    other = [n for n, own in unet.state_dict().items() if n not in given or given[n].shape != own.shape]
    if other:
        raise ValueError(f"model.unet: the UNet in '{folder}' has another shape, for instance in {other[0]}")
    unet.load_state_dict({name: given[name] for name in unet.state_dict()})


def load_vision(tokenizer: nn.Module, folder: str) -> None:
    """Copy the weights of `model.vision` into a visual tokenizer; errors as `load_part`."""
    load_part(tokenizer, Path(folder) / VISION, "model.vision")


def load_language(model: nn.Module, folder: str) -> None:
    """Copy the weights of `model.language` into a model; errors as `load_part`."""
    load_part(model, Path(folder) / LANGUAGE, "model.language")


def load_part(module: nn.Module, file: Path, key: str) -> None:
    """Copy the weights of a file into the parts of `module` that they name.

    Args:
        module: a model or a part.
        file: the weights.
        key: the setting that named the folder, for messages.

    Raises:
        ValueError: there are none, or they are of another size.
    """
    if not file.is_file():
        raise ValueError(f"{key}: '{file.parent}' has no {file.name}; give the `final` folder of the part's training")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{key}: '{file}' is damaged: {str(error).splitlines()[-1].strip()}") from None
    own = module.state_dict()
    for name, value in state.items():
        if name not in own or own[name].shape != value.shape:
            found = f"of shape {tuple(own[name].shape)}" if name in own else "not there"
            raise ValueError(f"{key}: '{file}' is of another model: {name} is {found} in this one")
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
