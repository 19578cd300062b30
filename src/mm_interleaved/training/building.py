"""The model and the processor that a run trains."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, CLIPVisionConfig, PreTrainedTokenizerBase

from ..adapters.folder import read_adapter
from ..checkpoints.checkpoint import check_folder, check_tokenizer, read_weights, weight_files
from ..checkpoints.components import config_from_components, from_components
from ..checkpoints.quantization import quantize_frozen
from ..generation import MMInterleaved
from ..io import read_json
from ..model import MMInterleavedConfig
from ..model.config import SUPPORTED_DECODERS
from ..model.cost import Part, count_parts
from ..pretrained import TOKENIZER
from ..processor import MMInterleavedProcessor, MMInterleavedTokenizer
from ..processor.tokenizer import add_image_tokens
from ..validation import nearest_name
from .adapters import attach_adapter
from .config import FRESH, ModelConfig, ModelPart, TrainConfig, WeightsConfig


def build(
    config: TrainConfig, default_tokenizer: Path | None = None, device: torch.device | None = None
) -> tuple[MMInterleaved, MMInterleavedProcessor]:
    """Build the model and the processor of a run. The parts of `freeze` are frozen; with an adapter, all of the model.

    Trainable weights are float32. Frozen ones have the run's `precision`, and those of the VAE `losses.vae_dtype`. The
    model is on the CPU but for quantized weights, which are on `device`, where it will be trained; None: the CPU, too.

    Raises:
        ValueError: the settings contradict each other, or a folder has unsuitable files.
    """
    source = config.model
    tokenizer = _tokenizer(source, default_tokenizer)
    model_config = _model_config(source, tokenizer)
    model_config.loss_text_weight, model_config.loss_image_weight = config.losses.text, config.losses.image
    model_config.normalize_image_loss = config.losses.normalize_image_loss
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = initial_model(source, model_config)
    freeze_parts(model, config.freeze)
    attach_adapter(model, config, frozen_layers(model, config.freeze))
    set_types(model, config)
    quantize_base(model, config, device)
    return model, MMInterleavedProcessor.for_model(model_config, tokenizer)


def build_config(source: ModelConfig, default_tokenizer: Path | None = None) -> MMInterleavedConfig:
    """Build only the configuration of the model.

    Raises:
        ValueError: the settings contradict each other, or a folder has unsuitable files.
    """
    return _model_config(source, _tokenizer(source, default_tokenizer))


def build_processor(source: ModelConfig, default_tokenizer: Path | None = None) -> MMInterleavedProcessor:
    """Build only the processor. The folders of `weights` need not exist yet.

    Raises:
        ValueError: the settings contradict each other, or a folder has unsuitable files.
    """
    tokenizer = _tokenizer(source, default_tokenizer)
    return MMInterleavedProcessor.for_model(_model_config(replace(source, weights=[]), tokenizer), tokenizer)


# Names of the parameters of a part (`freeze`): regular expressions, matched at the start.
PARTS: dict[ModelPart, str] = {
    "llm": r"(language_model|lm_head)\.(?!.*\.synchronizer\.)",
    "vision": r"visual_tokenizer\.",
    "image_decoder": r"image_decoder\.(?!.*\.synchronizers\.)",
    "mmfs": r".*\.synchronizers?\.",
}


def freeze_parts(model: nn.Module, parts: Sequence[ModelPart]) -> None:
    """Set `requires_grad` of the parameters of these parts to False; the model's configuration does not change."""
    patterns = [re.compile(PARTS[part]) for part in parts]
    for name, parameter in model.named_parameters():
        if any(pattern.match(name) for pattern in patterns):
            parameter.requires_grad_(False)


def frozen_layers(model: nn.Module, parts: Sequence[ModelPart]) -> set[str]:
    """Names of the modules of these parts."""
    patterns = [re.compile(PARTS[part]) for part in parts]
    return {name for name, _ in model.named_modules() if any(pattern.match(name) for pattern in patterns)}


def quantize_base(model: nn.Module, config: TrainConfig, device: torch.device | None = None) -> None:
    """Quantize the frozen linear layers in the parts of `model.quantize_parts`; the head and the VAE are left."""
    if config.model.quantize != "none":
        quantize_frozen(model, config.model.quantize, quantized_modules(model, config), device)


def quantized_modules(model: nn.Module, config: TrainConfig) -> set[str]:
    """Names of the modules whose frozen linear layers `quantize_base` quantizes."""
    names = frozen_layers(model, config.model.quantize_parts)
    chosen = {name for name in names if not name.startswith(("lm_head.", "image_decoder.vae."))}
    return chosen | {name.removesuffix(".base_layer") for name in chosen}


def empty_model(config: TrainConfig, model_config: MMInterleavedConfig) -> MMInterleaved:
    """The model on the meta device, with frozen parts and the adapter of the settings.

    Raises:
        InputError: the adapter selects no layer, or the one to train further cannot be read.
    """
    with torch.device("meta"):
        model = MMInterleaved(model_config)
        freeze_parts(model, config.freeze)
        if config.adapter is None or config.adapter.init_from is None:
            attach_adapter(model, config, frozen_layers(model, config.freeze))
        else:
            model.add_adapter(read_adapter(Path(config.adapter.init_from)).config)
    return model


def count_trained(config: TrainConfig) -> list[Part]:
    """The parameters of a run's model by part, and how many of them are trained. No weight is allocated.

    Raises:
        ValueError: the settings contradict each other, or a folder has unsuitable files.
    """
    return count_parts(empty_model(config, build_config(config.model, TOKENIZER)))


def set_types(model: MMInterleaved, config: TrainConfig) -> None:
    """Set trainable weights to float32, frozen ones to the run's `precision`, and the VAE to `losses.vae_dtype`."""
    frozen, vae = getattr(torch, config.precision), getattr(torch, config.losses.vae_dtype)
    for name, parameter in model.named_parameters():
        dtype = vae if name.startswith("image_decoder.vae.") else frozen
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def _tokenizer(source: ModelConfig, default: Path | None) -> PreTrainedTokenizerBase:
    if source.tokenizer is not None:
        folder = Path(source.tokenizer)
    elif source.init_from.checkpoint is not None:
        folder = Path(source.init_from.checkpoint)
    elif source.init_from.components is not None:
        folder = Path(source.init_from.components.llm)
    elif default is not None and source.init_from.preset != "release":
        folder = default
    else:
        raise ValueError("model.tokenizer must name the folder of a tokenizer")
    if not folder.exists():
        raise ValueError(f"the tokenizer's folder '{folder}' does not exist")
    try:
        if (folder / "tokenizer_config.json").is_file():
            check_tokenizer(folder)
            return AutoTokenizer.from_pretrained(folder)
        return MMInterleavedTokenizer.from_vocab(folder)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: SentencePiece cannot parse the file
        raise ValueError(f"'{folder}' holds no tokenizer: {str(error).splitlines()[0]}") from None


def _model_config(source: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> MMInterleavedConfig:
    """The configuration of the model, adapted to the tokenizer, the VAE and the overrides."""
    soi, image = add_image_tokens(tokenizer)
    init = source.init_from
    if init.components is not None:
        parts = init.components
        base = config_from_components(Path(parts.llm), Path(parts.clip), Path(parts.diffusion), len(tokenizer))
    elif init.checkpoint is not None:
        base = MMInterleavedConfig.from_pretrained(init.checkpoint)
    else:
        base = MMInterleavedConfig.preset(str(init.preset))
    tree = base.to_dict()
    if init.preset is not None:
        tree["text_config"]["vocab_size"] = len(tokenizer)
        tree |= {"soi_token_id": soi, "image_token_id": image}
        tree |= {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    _merge(tree, source.overrides)
    for entry in source.weights:
        if (vae := _vae_config(Path(entry.source))) is not None:
            tree["image_decoder"]["vae"] = vae
    if not source.mmfs.llm:
        tree["mmfs"]["enabled"] = False
    if not source.mmfs.unet:
        tree["image_decoder"]["mmfs"]["enabled"] = False
    _follow_vae(tree["image_decoder"])
    return MMInterleavedConfig(**tree)


def _merge(tree: dict[str, Any], changes: Mapping[str, Any], place: str = "") -> None:
    """Replace values of a tree by those of `changes`; `place` is the path of the tree in the configuration."""
    known = _known_keys(place, tree | dict(changes))
    for key, value in changes.items():
        inner = f"{place}.{key}".removeprefix(".")
        if known is not None and key not in known:
            raise ValueError(f"model.overrides has the unknown key '{inner}'. {nearest_name(key, sorted(known))}")
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value, inner)
        else:
            tree[key] = value


def _known_keys(place: str, tree: Mapping[str, Any]) -> set[str] | None:
    """The keys of the part `place` of the configuration; None: what reads the part checks its keys."""
    if not place:
        return set(MMInterleavedConfig.preset("debug").to_dict())
    if place == "vision_config":
        return set(CLIPVisionConfig().to_dict())
    if place == "text_config" and tree["model_type"] in SUPPORTED_DECODERS:
        return set(AutoConfig.for_model(tree["model_type"]).to_dict())
    networks = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "scheduler": DDPMScheduler}
    network = networks.get(place.removeprefix("image_decoder."))
    return None if network is None else set(inspect.signature(network.__init__).parameters)


def _vae_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of a diffusers VAE; None: the folder has none."""
    path = folder / "config.json"
    config = read_json(path, dict) if path.is_file() else {}
    if config.get("_class_name") != "AutoencoderKL":
        return None
    return {k: v for k, v in config.items() if not k.startswith("_")}


def _follow_vae(decoder: dict[str, Any]) -> None:
    """Adapt the channels and size of the UNet to the VAE."""
    vae = decoder["vae"]
    decoder["unet"] |= {
        "in_channels": vae["latent_channels"],
        "out_channels": vae["latent_channels"],
        "sample_size": decoder["image_size"] // 2 ** (len(vae["block_out_channels"]) - 1),
    }


def initial_model(source: ModelConfig, config: MMInterleavedConfig) -> MMInterleaved:
    """A model in float32 with the weights of the settings.

    Raises:
        ValueError: a folder has no weights or those of another model, or two entries of `weights` match one parameter.
    """
    init, fresh = source.init_from, [entry for entry in source.weights if entry.source == FRESH]
    if init.components is not None:
        folders = (Path(init.components.llm), Path(init.components.clip), Path(init.components.diffusion))
        model = cast(MMInterleaved, from_components(config, *folders, torch.float32, MMInterleaved))
    elif init.checkpoint is not None and source.mmfs.llm and source.mmfs.unet and not fresh:
        check_folder(Path(init.checkpoint))
        model = MMInterleaved.from_pretrained(init.checkpoint, config=config, dtype=torch.float32)
    else:
        model = MMInterleaved(config)
        if init.checkpoint is not None:  # whose synchronizers may be omitted
            anew = {name for entry in fresh for name in _names(model, entry, {})}
            kept = [name for name in model.state_dict() if name not in anew]
            _copy(model, folder_weights(Path(init.checkpoint)), kept, init.checkpoint)
    owners: dict[str, str] = {}  # the entry that sets a parameter, by its name
    for entry in source.weights:
        given = {} if entry.source == FRESH else folder_weights(Path(entry.source))
        names = _names(model, entry, given)
        if twice := next((name for name in names if name in owners), None):
            raise ValueError(f"model.weights names {twice} twice, from '{owners[twice]}' and from '{entry.source}'")
        owners |= dict.fromkeys(names, entry.source)
        if entry.source != FRESH:
            _copy(model, given, names, entry.source)
    return model


def _names(model: nn.Module, entry: WeightsConfig, given: Mapping[str, Tensor]) -> list[str]:
    """The parameters and buffers of the model that an entry sets."""
    if entry.parameters is None:
        return list(given)
    names = [name for name in model.state_dict() if re.search(entry.parameters, name)]
    if not names:
        raise ValueError(f"model.weights: the pattern '{entry.parameters}' matches no parameter of the model")
    return names


def _copy(model: nn.Module, given: Mapping[str, Tensor], names: Sequence[str], folder: str) -> None:
    own = model.state_dict()
    for name in names:
        if name not in own or name not in given or own[name].shape != given[name].shape:
            shapes = [tuple(state[name].shape) if name in state else "not there" for state in (given, own)]
            raise ValueError(f"'{folder}' is of another model: {name} is {shapes[0]} there and {shapes[1]} in this one")
    with torch.no_grad():
        for name in names:
            own[name].copy_(given[name])


def folder_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a model, a part of one or a diffusers VAE, by their names in a whole model.

    Raises:
        CheckpointError: the folder has no weights, or a file is damaged.
    """
    files = weight_files(folder)
    files = [file for file in files if file.name.startswith("model")] or files  # not a moving average
    state = {name: value for file in files for name, value in read_weights(file).items()}
    prefix = "image_decoder.vae." if _vae_config(folder) is not None else ""
    return {prefix + name: value for name, value in state.items()}
