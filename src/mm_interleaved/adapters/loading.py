"""Adapters of a model in memory: adding, loading, saving and merging them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.digest import weights_digest
from ..io import InputError
from ..model.weights import is_quantized
from ..processor import MMInterleavedProcessor
from .folder import CONFIG, PREFIX, WEIGHTS, AdapterFiles, AdapterInfo, apply_to_processor, read_adapter, write_info
from .settings import RANK, AdapterSettings
from .targets import find_targets

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "default"  # of a single adapter, as in PEFT


def start_adapter(
    model: PreTrainedModel, settings: AdapterSettings, seed: int = 0, left_out: Collection[str] = ()
) -> None:
    """Add a new adapter to a model, in place, or that of `init_from`. Only its weights, in float32, are trainable then.

    Args:
        model: the base.
        settings: its layers and sizes.
        seed: seed of new weights.
        left_out: names of layers that get no update.

    Raises:
        InputError: the preset or a target selects no layer, or `init_from` cannot be used or has other settings.
    """
    targets = find_targets(model, settings, left_out) if settings.preset is not None or settings.targets else None
    if settings.init_from is not None:
        files = read_adapter(Path(settings.init_from))
        _check_continued(files, settings, targets)
        files.config.lora_dropout = settings.dropout
        load_adapter(model, files, trainable=True, allow_other_base=settings.allow_other_base)
        return
    from peft import LoraConfig

    rank = settings.rank or RANK
    alpha = 2 * rank if settings.alpha is None else settings.alpha
    config = LoraConfig(
        r=rank, lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides it only
        lora_dropout=settings.dropout, target_modules=targets,
        use_dora=bool(settings.dora), use_rslora=bool(settings.rslora),
    )  # fmt: skip
    with _own_random_numbers(model):
        torch.manual_seed(seed)
        model.add_adapter(config, NAME)


def load_adapter(
    model: PreTrainedModel,
    files: AdapterFiles,
    name: str = NAME,
    *,
    trainable: bool = False,
    allow_other_base: bool = False,
    base: str | None = None,
    keep_float32: bool = False,
) -> None:
    """Add an adapter from a folder to a model, in place, and make it the active one.

    Args:
        model: its base.
        files: the adapter, see `read_adapter`.
        name: its name in the model.
        trainable: whether it is trained further; its weights are float32 then, and otherwise of the type of the base.
        allow_other_base: accept an adapter that was trained on another model with the same layers.
        base: digest of the base's weights; None: it is computed.
        keep_float32: keep its weights in float32 although it is not trained.

    Raises:
        InputError: it was trained on another model, or does not fit this one, which is unchanged then.
    """
    _check_base(model, files, allow_other_base, base)
    _check_layers(model, files)
    _check_stack(model, files)
    if name in getattr(model, "peft_config", {}):
        raise InputError(f"the model has an adapter '{name}' already", f"adapter '{files.folder}'",
                         "Give it another name")  # fmt: skip
    config = copy.deepcopy(files.config)
    config.target_modules, config.inference_mode = sorted(files.layers), False
    with _own_random_numbers(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        model.add_adapter(config, name)
    try:
        set_weights(model, files, name)
    except InputError:
        _remove(model, name)
        raise
    for layer in lora_layers(model).values():
        if name in layer.lora_A:
            dtype = torch.float32 if trainable or keep_float32 else layer.get_base_layer().weight.dtype
            for part in (layer.lora_A[name], layer.lora_B[name], *_magnitudes(layer, name)):
                part.to(dtype).requires_grad_(trainable)


def load_adapters(
    model: PreTrainedModel,
    folders: Sequence[Path],
    processor: MMInterleavedProcessor | None = None,
    allow_other_base: bool = False,
    keep_float32: bool = False,
) -> list[AdapterFiles]:
    """Load several adapters into a model; their updates are added to each other.

    Args:
        model: their base.
        folders: their folders.
        processor: gets the crop and the template of the adapters; None: it is left as it is.
        allow_other_base: accept adapters that were trained on another model with the same layers.
        keep_float32: keep their weights in float32, for merging.

    Raises:
        InputError: one cannot be used or is given twice, or two need different crops or templates.
    """
    if twice := next((f for i, f in enumerate(folders) if f.resolve() in {g.resolve() for g in folders[:i]}), None):
        raise InputError("it is given twice, which would double its updates", f"adapter '{twice}'", "Give it once")
    base = base_digest(model) if folders and not allow_other_base else None
    names = [NAME if number == 0 else f"{NAME}_{number + 1}" for number in range(len(folders))]
    loaded = [read_adapter(folder) for folder in folders]
    done: list[str] = []
    try:
        for files, name in zip(loaded, names, strict=True):
            load_adapter(model, files, name, allow_other_base=allow_other_base, base=base, keep_float32=keep_float32)
            done.append(name)
    except InputError:
        for name in reversed(done):
            _remove(model, name)
        raise
    if len(loaded) > 1:
        model.set_adapter(names)
        for layer in lora_layers(model).values():
            layer.requires_grad_(False)
    if processor is not None:
        _set_processor(processor, loaded)
    return loaded


def load_choices(
    model: PreTrainedModel,
    folders: Mapping[str, Path],
    processor: MMInterleavedProcessor,
    allow_other_base: bool = False,
) -> Mapping[str | None, Callable[[], None]]:
    """Load adapters of which at most one acts at a time; none acts at first.

    Args:
        model: their base, without any adapter.
        folders: their folders by name.
        processor: gets the crop and the template of the adapters.
        allow_other_base: accept adapters that were trained on another model with the same layers.

    Returns:
        For each name a function that lets this adapter act; for None one that lets none act.

    Raises:
        InputError: one cannot be used, or two need different crops or templates.
    """
    base = base_digest(model) if folders and not allow_other_base else None
    loaded = {name: read_adapter(folder) for name, folder in folders.items()}
    for name, files in loaded.items():
        load_adapter(model, files, name, allow_other_base=allow_other_base, base=base)
    _set_processor(processor, list(loaded.values()))

    def act(name: str | None) -> None:
        if not loaded:
            return
        if name is None:
            model.disable_adapters()
            return
        model.enable_adapters()
        model.set_adapter(name)
        for layer in lora_layers(model).values():
            layer.requires_grad_(False)

    act(None)
    return {name: partial(act, name) for name in (None, *loaded)}


def base_digest(model: PreTrainedModel) -> str:
    """The digest of the weights that a model was loaded from, or of those in memory if it was not loaded from a folder.

    Quantization and other types change weights in memory, so the folder comes first.
    """
    folder = Path(model.name_or_path or "")
    is_local = bool(model.name_or_path) and (folder / "config.json").is_file()
    return weights_digest(folder if is_local else model)


def save_adapter(model: PreTrainedModel, folder: Path, info: AdapterInfo, name: str = NAME) -> None:
    """Write an adapter of a model into an existing folder."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {PREFIX + key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    save_settings(model, folder, info, name)


def save_settings(model: PreTrainedModel, folder: Path, info: AdapterInfo, name: str = NAME) -> None:
    """Write what an adapter folder has besides the weights: PEFT's settings, and what the adapter was trained on."""
    config: Any = copy.copy(_configs(model)[name])
    config.inference_mode = True
    config.target_modules = sorted(key for key, layer in lora_layers(model).items() if name in layer.lora_A)
    config.save_pretrained(str(folder))
    write_info(folder, info)


def adapter_bytes(model: nn.Module) -> int:
    """Size of all adapters of a model."""
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if ".lora_" in name)


def merge_adapters(model: PreTrainedModel) -> None:
    """Add the updates of the active adapters to the weights of a model, in place, and remove all its adapters.

    Sums are computed in float32 and rounded once to the type of the weights.

    Raises:
        ValueError: the model has no adapter, or its weights are quantized.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapter to merge")
    if is_quantized(model):
        raise ValueError("adapters cannot be merged into a quantized model; load its base without quantization")
    for name, layer in layers.items():
        linear = layer.get_base_layer()
        dtype = linear.weight.dtype
        layer.float()
        layer.merge(safe_merge=True)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, linear.to(dtype))
    model.delete_adapter(list(_configs(model)))
    for name, parameter in model.named_parameters():
        assert ".lora_" not in name
        parameter.requires_grad_(False)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers around those that adapters change, by name."""
    if not _configs(model):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def set_weights(model: PreTrainedModel, files: AdapterFiles, name: str = NAME) -> None:
    """Give an adapter of a model the weights of a folder.

    Raises:
        InputError: the folder has other weights than the adapter.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    where, fix = f"adapter '{files.folder}'", "Fetch the whole adapter again"
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if apart := sorted(own.keys() ^ files.tensors.keys()):
        which = "lacks" if apart[0] in own else "has"
        raise InputError(f"{WEIGHTS} {which} {apart[0]}, unlike the adapter of the model", where, fix)
    for key, tensor in own.items():
        if tensor.shape != files.tensors[key].shape:
            raise InputError(f"{WEIGHTS} has {key} of shape {list(files.tensors[key].shape)} instead of "
                             f"{list(tensor.shape)}", where, fix)  # fmt: skip
    set_peft_model_state_dict(model, dict(files.tensors), adapter_name=name)


def adapter_settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What the result of a model depends on besides the weights of its adapters, by the names of the active ones."""
    layers = lora_layers(model).values()
    active = sorted({name for layer in layers if not layer.disable_adapters for name in layer.active_adapters})
    names = ("r", "lora_alpha", "use_rslora", "use_dora")
    return {name: {key: getattr(_configs(model)[name], key) for key in names} for name in active}


# ---- checks


def _check_base(model: PreTrainedModel, files: AdapterFiles, allow_other_base: bool, own: str | None) -> None:
    if allow_other_base:
        return
    where, fix = f"adapter '{files.folder}'", "Use its base, or set allow_other_base if you know that it fits"
    if files.info is None:
        raise InputError("it has no adapter.json, so nothing says which model it was trained on", where, fix)
    own = own or base_digest(model)
    if files.info.base != own:
        raise InputError(
            f"it was trained on the weights {files.info.base[:16]}... ('{files.info.base_path}'), and this model has "
            f"{own[:16]}... ('{model.name_or_path or type(model).__name__}')", where, fix,
        )  # fmt: skip


def _check_continued(files: AdapterFiles, settings: AdapterSettings, targets: Sequence[str] | None) -> None:
    """What the settings say of an adapter that is trained further must be what it has."""
    where, fix = f"adapter.init_from '{files.folder}'", "Leave that setting out: those of the adapter stay"
    config = files.config
    own = {"rank": config.r, "alpha": config.lora_alpha, "dora": config.use_dora, "rslora": config.use_rslora}
    for name, value in own.items():
        wanted = getattr(settings, name)
        if wanted is not None and wanted != value:
            raise InputError(f"its {name} is {value}, and adapter.{name} is {wanted}", where, fix)
    if apart := sorted(files.layers.symmetric_difference(targets or files.layers)):
        which = "changes" if apart[0] in files.layers else "does not change"
        raise InputError(f"it {which} {apart[0]}, unlike adapter.preset and adapter.targets", where, fix)


def _check_layers(model: nn.Module, files: AdapterFiles) -> None:
    """Every layer of the adapter is one of the model with the same sizes, and none that it names is without weights."""
    from peft.tuners.tuners_utils import check_target_module_exists

    where = f"adapter '{files.folder}'"
    modules = {name: _base_layer(module) for name, module in model.named_modules() if not _is_inside(name)}
    for layer in sorted(files.layers):
        module = modules.get(layer)
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            raise InputError(f"it changes '{layer}', and this model has no such layer", where, "Use its base")
        down, up = (tuple(files.tensors[f"{layer}.lora_{kind}.weight"].shape) for kind in "AB")
        shape = tuple(module.weight.shape)
        if down[1:] != shape[1:] or up[0] != shape[0] or down[0] != up[1]:
            raise InputError(f"its update of '{layer}' is {down} by {up}, and the weight there is {shape}", where,
                             "Use its base")  # fmt: skip
    named = {name for name in modules if check_target_module_exists(files.config, name)}
    if apart := sorted(named ^ files.layers):
        which = "names" if apart[0] in named else "does not name"
        raise InputError(f"{CONFIG} {which} '{apart[0]}', unlike {WEIGHTS}", where, "Fetch the whole adapter again")


def _is_inside(name: str) -> bool:
    return ".base_layer" in name or ".lora_" in name


def _base_layer(module: nn.Module) -> nn.Module:
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def _check_stack(model: nn.Module, files: AdapterFiles) -> None:
    """DoRA scales whole rows of the sum, so its update has no meaning beside another one."""
    configs = _configs(model)
    for name, layer in lora_layers(model).items():
        others = [other for other in layer.lora_A if files.config.use_dora or configs[other].use_dora]
        if name in files.layers and others:
            raise InputError(
                f"two adapters change '{name}', and one of them is a DoRA, which cannot be added to another",
                f"adapter '{files.folder}'", "Merge the first into the base, and train the second on that",
            )  # fmt: skip


def _configs(model: nn.Module) -> dict[str, LoraConfig]:
    return getattr(model, "peft_config", {})


# ---- changes of the model


def _remove(model: PreTrainedModel, name: str) -> None:
    """Remove an adapter, and the layers of PEFT that have none left."""
    layers = lora_layers(model)
    model.delete_adapter(name)
    for path, layer in layers.items():
        if not layer.lora_A:
            owner, _, last = path.rpartition(".")
            setattr(model.get_submodule(owner), last, layer.get_base_layer())


def _magnitudes(layer: Any, name: str) -> Iterator[nn.Module]:
    """The lengths of rows of a DoRA."""
    vectors = getattr(layer, "lora_magnitude_vector", {})
    if name in vectors:
        yield vectors[name]


@contextmanager
def _own_random_numbers(model: nn.Module) -> Iterator[None]:
    """Leave the global random numbers as they are: new layers of PEFT get random values."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        yield


def _set_processor(processor: MMInterleavedProcessor, loaded: Sequence[AdapterFiles]) -> None:
    first: AdapterFiles | None = None
    for files in loaded:
        if files.info is None:
            continue
        if first is not None and first.info is not None and first.info.processor != files.info.processor:
            raise InputError(f"its crop, template or special tokens differ from those of '{first.folder}'",
                             f"adapter '{files.folder}'", "Use one of them")  # fmt: skip
        first = first or files
        apply_to_processor(files.info.processor, processor, f"adapter '{files.folder}'")
