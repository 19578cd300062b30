"""The models of the package, and `load`, which returns a model and its processor.

loaded = load("small")            # or "debug", or the folder of a checkpoint
loaded.model, loaded.processor
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import PROCESSOR_NAME

from ..adapters.folder import is_adapter
from ..adapters.loading import load_adapters
from ..checkpoints.checkpoint import check_folder, check_tokenizer
from ..checkpoints.quantization import Quantization, quantize
from ..generation import MMInterleaved
from ..io import InputError
from ..model import MMInterleavedConfig
from ..model.offloading import offload as offload_parts
from ..plugins import Registry
from ..processor import MMInterleavedProcessor, MMInterleavedTokenizer

FOLDER = Path(__file__).parent
TOKENIZER = FOLDER / "small" / "tokenizer.model"  # of all models here, also of presets with random weights
MODELS: Registry[Path] = Registry(
    "mm_interleaved.models", "model", Path, {name: FOLDER / name for name in ("small", "debug")}
)
# The libraries' errors for files that are missing, damaged, or of another kind.
_UNUSABLE = (
    SafetensorError, ValueError, RuntimeError, OSError, LookupError, TypeError, AttributeError, ArithmeticError,
)  # fmt: skip


@dataclass
class Loaded:
    """A model ready for use.

    Attributes:
        model: the model, in evaluation mode.
        processor: its processor.
        trained: False: the weights are random, since the package has none yet.
        name: the name it was loaded by, its adapters and its quantization.
    """

    model: MMInterleaved
    processor: MMInterleavedProcessor
    trained: bool
    name: str


def load(
    name: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None,
    quantization: Quantization | None = None, adapters: Sequence[str | Path] = (), allow_other_base: bool = False,
    offload: bool = False,
) -> Loaded:  # fmt: skip
    """Load a model and its processor, and adapters for it.

    Args:
        name: `small`, `debug`, the name of a plug-in's model, or a folder that `save_pretrained` or
            `mmi convert` wrote.
        dtype: type of the weights; None: float32 for a named model, the stored type for a folder.
        device: the device; None: the CPU.
        quantization: "int8", "fp8", "int4" or "nf4" for the language model's large matrices, see `quantize`; None:
            none.
        adapters: folders of adapters, whose updates are added to each other; the processor gets their crop and
            template.
        allow_other_base: accept adapters that were trained on another model with the same layers.
        offload: keep the large parts in main memory and copy each to `device` when it is needed, see
            `model.offloading`.

    Raises:
        ValueError: the model does not exist, one of its files (which the message names) is missing or damaged, it
            cannot be quantized, an adapter does not belong to it, or there is no GPU to offload from.
    """
    if offload and torch.device(device or "cpu").type == "cpu":
        raise ValueError("offloading moves parts between main memory and a GPU, but the device is the CPU; leave it "
                         "out (--offload), or choose a GPU")  # fmt: skip
    named = str(name) in MODELS
    folder = MODELS[str(name)] if named else Path(name)
    if (folder / "config.json").is_file():
        kind = dtype or (torch.float32 if named else "auto")
        model, processor = _read(folder, kind)
        trained = True
    elif folder.parent == FOLDER:
        model, processor = _untrained(str(name))
        if dtype is not None:
            model.to(dtype)
            model.image_decoder.vae.float()  # as in `from_pretrained`
        trained = False
    elif is_adapter(folder):
        raise InputError(f"'{name}' is an adapter, not a model",
                         fix="Give its base as the model, and it with --adapter or load(base, adapters=[...])"
                         )  # fmt: skip
    elif named or folder.is_dir():
        raise ValueError(f"model '{name}' has no config.json in '{folder}'; give the folder of a checkpoint")
    else:
        unknown = MODELS.unknown(str(name))
        raise InputError(f"{unknown.problem}, and no folder has this name", fix=unknown.fix)
    load_adapters(model, [Path(adapter) for adapter in adapters], processor, allow_other_base)
    if quantization is not None:
        quantize(model, quantization, device)
    if offload:
        assert device is not None
        offload_parts(model, device)
    elif device is not None:
        model.to(device)
    shown = " + ".join(map(str, (name, *adapters))) + ("" if quantization is None else f" ({quantization})")
    return Loaded(model.eval(), processor, trained, shown)


def _read(folder: Path, dtype: torch.dtype | str) -> tuple[MMInterleaved, MMInterleavedProcessor]:
    MMInterleavedConfig.from_pretrained(folder)  # raises for an invalid configuration before weights are read
    check_folder(folder)
    check_tokenizer(folder)
    if not (folder / PROCESSOR_NAME).is_file():  # transformers would silently take defaults instead
        raise ValueError(f"'{folder}' lacks {PROCESSOR_NAME}; fetch or convert the whole checkpoint")
    what = "weights"
    try:
        model = MMInterleaved.from_pretrained(folder, dtype=dtype)
        what = "processor"
        return model, MMInterleavedProcessor.from_pretrained(folder)
    except _UNUSABLE as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the {what} of '{folder}' cannot be used: {words}; fetch or convert the checkpoint again"
                         ) from None  # fmt: skip


def _untrained(preset: str) -> tuple[MMInterleaved, MMInterleavedProcessor]:
    """A preset with random weights of a fixed seed."""
    config = MMInterleavedConfig.preset(preset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MMInterleaved(config)
    return model, MMInterleavedProcessor.for_model(config, MMInterleavedTokenizer.from_vocab(TOKENIZER))
