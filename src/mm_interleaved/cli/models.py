"""Devices, float types and models by the names that commands take."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..io import InputError
from .console import console
from .errors import UsageError

if TYPE_CHECKING:
    import torch

    from ..checkpoints.quantization import Quantization
    from ..pretrained import Loaded

DTYPES = ("float32", "bfloat16", "float16")
Adapters = Annotated[
    list[Path] | None, typer.Option("--adapter", help="Folder of an adapter for the model; several are added up.")
]
QuantizationName = Annotated[
    str | None,
    typer.Option(
        "--quantization", help="Quantize the language model to 8 or 4 bits (not lossless): int8, fp8, int4, nf4."
    ),
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Copy each large part of the model to the GPU only while it is needed.")
]
AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Accept an adapter that was trained on another model.")
]


def find_dtype(name: str) -> torch.dtype:
    """The float type of that name.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, not '{name}'")
    import torch

    return getattr(torch, name)


def find_quantization(name: str | None) -> Quantization | None:
    """The quantization of that name.

    Raises:
        UsageError: there is none.
    """
    from ..checkpoints.quantization import QUANTIZATIONS

    for known in QUANTIZATIONS:
        if name == known:
            return known
    if name is not None:
        raise UsageError(f"--quantization must be one of {', '.join(QUANTIZATIONS)}, not '{name}'")
    return None


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one.

    Raises:
        UsageError: the name is unknown, or this machine has no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device '{name}' is not the name of a device; write cpu, cuda or cuda:1") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"--device '{name}' is not there: this machine has {count} CUDA devices that torch can use")
    return device


def check_cpu(device: str | None) -> None:
    """Check the device of a command that may run on several GPUs: the CPU, or None for the GPUs of its processes.

    Raises:
        UsageError: another one is named.
    """
    if device not in (None, "cpu"):
        raise UsageError(f"--device can only be cpu, not '{device}'; choose GPUs with CUDA_VISIBLE_DEVICES")


def load_model(
    name: str,
    dtype: torch.dtype | None,
    device: torch.device | None,
    quantization: Quantization | None,
    quiet: bool = False,
    adapters: Sequence[str | Path] = (),
    allow_other_base: bool = False,
    offload: bool = False,
) -> Loaded:
    """Load a model, its adapters and its processor.

    Args:
        name: a model of the package, or the folder of a checkpoint.
        dtype: type of the weights; None: `load` chooses it.
        device: device of the weights.
        quantization: one of `QUANTIZATIONS`; None: no quantization.
        quiet: whether to hide the progress.
        adapters: folders of adapters, whose updates are added.
        allow_other_base: accept adapters that were trained on another model.
        offload: copy each large part to the device only while it is needed.

    Raises:
        UsageError: it cannot be loaded, or an adapter cannot be used.
    """
    from ..pretrained import load

    try:
        with nullcontext() if quiet else console.status(f"loading {escape(name)}"):
            return load(name, dtype, device, quantization, adapters, allow_other_base, offload)
    except InputError:
        raise
    except (ValueError, RuntimeError, OSError) as error:  # the libraries' errors for folders that they cannot load
        raise UsageError(f"model '{name}' cannot be loaded: {str(error).strip().splitlines()[0]}") from None
