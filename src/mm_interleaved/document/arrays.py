"""Arrays and tensors as images. Each has one layout and one range of values; anything else is an error.

    NumPy array     [height, width] or [height, width, 1, 3 or 4]     channels last
    PyTorch tensor  [height, width] or [1, 3 or 4, height, width]     channels first

Values are uint8 in [0, 255] or floats in [0, 1]. An image holds 8 bits a channel, so floats are rounded.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import PIL.Image

from ..io import InputError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def is_array(value: Any) -> bool:
    """Whether `value` is a NumPy array or a PyTorch tensor. Does not import PyTorch."""
    return isinstance(value, np.ndarray) or (hasattr(value, "detach") and hasattr(value, "numpy"))


def image_from_array(value: Any) -> PIL.Image.Image:
    """Copy a NumPy array or a PyTorch tensor into an image.

    Raises:
        InputError: the shape, type or values are not among those listed at the top of this module.
    """
    array = cast(np.ndarray, value) if isinstance(value, np.ndarray) else _tensor_values(value)
    kind = "array" if isinstance(value, np.ndarray) else "tensor"
    _check_shape(array.shape, kind)
    if kind == "tensor" and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    pixels = np.ascontiguousarray(_pixels(array, kind))
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    mode = _MODES[pixels.shape[-1]]
    return PIL.Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), pixels.tobytes())


def _tensor_values(tensor: Any) -> np.ndarray:
    try:
        tensor = tensor.detach().cpu()
        # NumPy has no bfloat16 and no 8-bit floats; float32 holds all their values
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:  # on the meta device, sparse, quantized
        raise InputError(f"the values of the tensor cannot be read: {_first_line(error)}",
                         fix="Give a dense tensor on the CPU or a GPU") from None  # fmt: skip


def _check_shape(shape: tuple[int, ...], kind: str) -> None:
    channels, other = (0, -1) if kind == "tensor" else (-1, 0)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[channels] not in _MODES):
        article = "a" if kind == "tensor" else "an"
        raise InputError(f"{article} {kind} of shape {list(shape)} is no image", fix=_advice(shape, kind, other))
    if 0 in shape:
        raise InputError(f"the {kind} of shape {list(shape)} has no pixels", fix="Leave the image out")


def _advice(shape: tuple[int, ...], kind: str, other: int) -> str:
    """The advice for a wrong shape; `other` is the channel axis of the other layout."""
    if len(shape) == 4:
        return "Give one image of the batch at a time"
    if len(shape) == 3 and shape[other] in (1, 3):
        return ("Channels come first in a tensor: tensor.permute(2, 0, 1)" if kind == "tensor"
                else "Channels come last in an array: array.transpose(1, 2, 0)")  # fmt: skip
    layout = "[1, 3 or 4, height, width]" if kind == "tensor" else "[height, width, 1, 3 or 4]"
    return f"Give {layout}, or [height, width]"


def _pixels(array: np.ndarray, kind: str) -> np.ndarray:
    """The values as uint8."""
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"the {kind} has values of type {array.dtype}",
                         fix="Give uint8 in [0, 255] or floats in [0, 1]")  # fmt: skip
    if not np.isfinite(array).all():
        raise InputError(f"the {kind} holds NaN or infinite values", fix="Give floats in [0, 1]")
    least, most = float(array.min()), float(array.max())
    if least < 0 or most > 1:
        raise InputError(f"the {kind} has floats from {least:g} to {most:g}, outside [0, 1]",
                         fix="Divide by 255, undo a normalization, or clip")  # fmt: skip
    return (array.astype(np.float64) * 255 + 0.5).astype(np.uint8)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
