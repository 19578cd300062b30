"""Devices, float types and models by the names that commands take."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from ..io import InputError
from .console import console
from .errors import UsageError
from .options import DTYPES

if TYPE_CHECKING:
    import torch

    from ..checkpoints.quantization import Quantization
    from ..pretrained import Loaded


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


@dataclass(frozen=True)
class ModelOptions:
    """The options of a command that name a model and how it is loaded; `load` loads it.

    Attributes:
        name: a model of the package, or the folder of a checkpoint.
        device: device of the weights; `auto`: a GPU if there is one.
        dtype: type of the weights; None: the type that `pretrained.load` chooses.
        quantization: one of `QUANTIZATIONS`; None: no quantization.
        adapters: folders of adapters, whose updates are added; None: no adapters.
        allow_other_base: accept adapters that were trained on another model.
        offload: copy each large part to the device only while it is needed.

    Raises:
        UsageError: a type, a quantization or a device is unknown.
    """

    name: str
    device: str
    dtype: str | None = None
    quantization: str | None = None
    adapters: Sequence[str | Path] | None = None
    allow_other_base: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None:
            find_dtype(self.dtype)
        find_quantization(self.quantization)
        find_device(self.device)

    def load(self, quiet: bool = False) -> Loaded:
        """Load the model, its adapters and its processor; `quiet` hides the progress.

        Raises:
            UsageError: it cannot be loaded, or an adapter cannot be used.
        """
        from ..pretrained import load

        dtype = None if self.dtype is None else find_dtype(self.dtype)
        try:
            with nullcontext() if quiet else console.status(f"loading {escape(self.name)}"):
                return load(
                    self.name, dtype, find_device(self.device), find_quantization(self.quantization),
                    self.adapters or (), self.allow_other_base, self.offload,
                )  # fmt: skip
        except InputError:
            raise
        except (ValueError, RuntimeError, OSError) as error:  # the libraries' errors for folders that they cannot load
            raise UsageError(f"model '{self.name}' cannot be loaded: {str(error).strip().splitlines()[0]}") from None


def note_random_weights(loaded: Loaded) -> None:
    """Print a note if a model is untrained."""
    if not loaded.trained:
        console.print(f"[yellow]note:[/] the weights of '{loaded.name}' are untrained: its outputs are noise")
