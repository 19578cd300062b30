"""The folder of an adapter.

    adapter_config.json, adapter_model.safetensors    PEFT's own format, which PEFT loads too
    adapter.json                                      what it was trained on: `AdapterInfo`

No other file is read, and never a pickle.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor

from .. import __version__
from ..checkpoints.checkpoint import CheckpointError, read_weights
from ..io import InputError, read_json, write_json
from ..processor import MMInterleavedProcessor
from ..validation import Count, parse, settings

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG, WEIGHTS, ABOUT = "adapter_config.json", "adapter_model.safetensors", "adapter.json"
PREFIX = "base_model.model."  # of all names in the file, in PEFT's format
PACKAGES = ("torch", "transformers", "peft")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
# Features of LoRA that change or replace the base's own weights, or that no setting of ours makes.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "lora_bias": (False,), "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}  # fmt: skip
_ABSENT = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "megatron_config",
           "alora_invocation_tokens", "use_qalora", "arrow_config", "exclude_modules")  # fmt: skip


@settings
class ProcessorInfo:
    """How documents became tensors in training; see `MMInterleavedProcessor`."""

    crop: Literal["center", "squash"]
    chat_template: str
    num_image_tokens: Count
    image_size: Count
    target_size: Count
    special_tokens: dict[str, int | None]


@settings(kw_only=True)
class AdapterInfo:
    """What an adapter was trained on.

    Attributes:
        base: digest of the base's weights, see `weights_digest`.
        base_path: the folder or the name on the hub that the base was loaded from.
        base_quantization: how the frozen base was quantized in training.
        processor: settings of the processor.
        tasks: the data it was trained on.
        preset: the preset of its layers; None: none.
        seed: seed of the run.
        versions: versions of the packages by name.
    """

    base: str
    base_path: str
    base_quantization: str = "none"
    processor: ProcessorInfo
    tasks: list[str] = field(default_factory=list)
    preset: str | None = None
    seed: Count | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class AdapterFiles:
    """An adapter in memory.

    Attributes:
        folder: where it was read from.
        config: its settings in PEFT.
        tensors: its weights, by their names in the model without the adapter's name.
        info: what it was trained on; None: another program wrote the folder.
    """

    folder: Path
    config: LoraConfig
    tensors: dict[str, Tensor]
    info: AdapterInfo | None

    @property
    def layers(self) -> set[str]:
        """Names of the layers that it changes."""
        return {name.rpartition(".lora_")[0] for name in self.tensors if ".lora_" in name}


def is_adapter(folder: Path) -> bool:
    """Whether a folder is that of an adapter."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> AdapterFiles:
    """Read an adapter and check that its files belong together.

    Raises:
        InputError: it is no adapter, one that cannot be used here, or a file is missing or damaged.
    """
    _check_files(folder)
    config = _read_config(folder)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read_weights(folder / WEIGHTS).items()}
    info = parse(read_json(folder / ABOUT, dict), AdapterInfo, str(folder / ABOUT)) if _has_info(folder) else None
    found = AdapterFiles(folder, config, tensors, info)
    kinds = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if config.use_dora else set())
    names = {f"{layer}.{kind}" for layer in found.layers for kind in kinds}
    if odd := sorted(set(tensors) ^ names):
        unknown = [name for name in odd if name not in names]
        what = f"has {unknown[0]}, which is not the weight of a LoRA" if unknown else f"lacks {odd[0]}"
        raise CheckpointError(f"'{folder / WEIGHTS}' {what}; fetch the whole adapter again")
    if not tensors:
        raise CheckpointError(f"'{folder / WEIGHTS}' holds no weights; fetch the adapter again")
    return found


def _has_info(folder: Path) -> bool:
    return (folder / ABOUT).is_file()


def _check_files(folder: Path) -> None:
    where = f"adapter '{folder}'"
    if not folder.is_dir():
        raise InputError("there is no such folder", where, "Give the folder of an adapter; mmi download fetches one")
    if not is_adapter(folder):
        if (folder / "config.json").is_file():
            raise InputError("this is a whole model, not an adapter", where, "Give it as the model, without --adapter")
        inner = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        hint = f"Name '{inner[0]}', which is one" if inner else "Give the folder of an adapter, such as a run's 'final'"
        raise InputError(f"there is no {CONFIG} in it, so it is not an adapter", where, hint)
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise InputError("adapter_model.bin is a pickle, which can run any code when it is read; it was not read",
                             where, f"Ask its author for {WEIGHTS}")  # fmt: skip
        raise InputError(f"there is no {WEIGHTS} in it", where, "Fetch the whole adapter")


def _read_config(folder: Path) -> LoraConfig:
    """The settings of PEFT, which must be those of LoRA without features that change the base."""
    from peft import LoraConfig, PeftConfig

    path = folder / CONFIG
    data = read_json(path, dict)
    if data.get("peft_type") != "LORA":
        raise InputError(f"peft_type is {data.get('peft_type')!r}; only LoRA adapters can be used", str(path))
    for name, allowed in _PLAIN.items():
        if name in data and data[name] not in allowed:
            raise InputError(f"'{name}' is {data[name]!r}, which is not supported", str(path),
                             f"Train an adapter with {allowed[0]!r}")  # fmt: skip
    for name in _ABSENT:
        if data.get(name):
            raise InputError(f"'{name}' is set, which is not supported", str(path), "Train an adapter without it")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"PEFT cannot read it: {str(error).splitlines()[0]}", str(path)) from None
    if not isinstance(config, LoraConfig) or not isinstance(config.r, int) or config.r < 1:
        raise InputError(f"the rank 'r' is {data.get('r')!r}; it must be a whole number from 1 on", str(path))
    return config


def describe_adapter(files: AdapterFiles) -> dict[str, Any]:
    """What an adapter is, by name."""
    config, info = files.config, files.info
    layers = Counter(".".join(name.split(".")[:2]) for name in files.layers)
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    size = sum(t.numel() * t.element_size() for t in files.tensors.values())
    about: dict[str, Any] = {
        "kind": kind, "rank": config.r, "alpha": config.lora_alpha, "layers": dict(sorted(layers.items())),
        "parameters": sum(t.numel() for t in files.tensors.values()), "bytes": size,
    }  # fmt: skip
    if info is None:
        return {**about, "base": f"not known (there is no {ABOUT})"}
    return {**about, "preset": info.preset, "base": info.base, "base_path": info.base_path,
            "base_quantization": info.base_quantization, "tasks": info.tasks, "seed": info.seed,
            "crop": info.processor.crop, "versions": info.versions}  # fmt: skip


def processor_info(processor: MMInterleavedProcessor) -> ProcessorInfo:
    """What an adapter's folder says about the processor."""
    tokenizer = processor.tokenizer
    special = {name: cast("int | None", getattr(tokenizer, name)) for name in SPECIAL}
    special |= {"soi_token_id": processor.soi_token_id, "image_token_id": processor.image_token_id}
    crop = "squash" if processor.crop == "squash" else "center"
    return ProcessorInfo(crop, str(processor.chat_template), processor.num_image_tokens,
                         processor.image_size, processor.target_size, special)  # fmt: skip


def apply_to_processor(info: ProcessorInfo, processor: MMInterleavedProcessor, where: str) -> None:
    """Give a processor the crop and the template of an adapter.

    Raises:
        InputError: sizes or special tokens differ, so the processor cannot make the tensors of the training.
    """
    own = processor_info(processor)
    for name in ("special_tokens", "num_image_tokens", "image_size", "target_size"):
        theirs, mine = getattr(info, name), getattr(own, name)
        if theirs != mine:
            raise InputError(f"it was trained with {name} {theirs}, and the model's processor has {mine}", where,
                             "Use the processor of its base")  # fmt: skip
    processor.crop, processor.chat_template = info.crop, info.chat_template


def package_versions() -> dict[str, str]:
    """Versions of the packages that trained an adapter."""
    found = {"mm-interleaved": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_info(folder: Path, info: AdapterInfo) -> None:
    """Write `adapter.json`, and name the base in the settings of PEFT, which exist already."""
    write_json(folder / CONFIG, {**read_json(folder / CONFIG, dict), "base_model_name_or_path": info.base_path})
    write_json(folder / ABOUT, asdict(info))
