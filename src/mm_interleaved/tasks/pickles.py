"""Reads the pickles that some data sets are published as, without running anything that is in them.

Containers, strings, bytes and numbers are read as they are; numpy arrays are rebuilt here from their plain parts, so
that not even numpy's own unpickling sees the file. Anything else in the file is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from .files import TaskError

_DTYPE = re.compile(r"[<>|=]?(?:O8?|[SU]\d*|[iufb]\d+)")
_BROKEN = (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError, KeyError, TypeError, ImportError,
           OverflowError, MemoryError)  # fmt: skip


def read_pickle(path: Path) -> Any:
    """A file of plain data: dicts, lists, tuples, strings, bytes, numbers; arrays become lists.

    Raises:
        TaskError: it cannot be read, or holds anything else.
    """
    return _load(_bytes(path), path)


def read_npy(path: Path) -> Any:
    """The array of an `.npy` file as nested lists (a single object as itself), pickled inside or not.

    Raises:
        TaskError: it cannot be read, or holds anything but plain data.
    """
    content = _bytes(path)
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[version](file)
        if not dtype.hasobject:
            return np.load(io.BytesIO(content), allow_pickle=False).tolist()
    except (ValueError, KeyError, EOFError) as error:
        raise TaskError(f"not an .npy file that can be read: {error}", str(path), "Fetch it again") from None
    value = _load(content[file.tell() :], path)
    return value[0] if shape == () and isinstance(value, list) and len(value) == 1 else value


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TaskError(f"cannot be read: {error.strerror}", str(path)) from None


def _load(content: bytes, path: Path) -> Any:
    try:
        return _plain(_Unpickler(io.BytesIO(content), encoding="latin1").load(), path)
    except _Refused as error:
        raise TaskError(f"the pickle asks for {error}, which plain data does not need; it was not run", str(path),
                        "Do not trust this file; fetch it again from its owners") from None  # fmt: skip
    except _BROKEN as error:
        raise TaskError(f"a broken pickle: {error}", str(path), "Fetch it again") from None
    except RecursionError:
        raise TaskError("a pickle that is nested too deeply", str(path), "Fetch it again") from None


class _Refused(Exception):
    """Names what a pickle may not have."""


class _Dtype:
    """The name of an array's type."""

    def __init__(self, name: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """(version, byte order, ...); an order that is told is put in front of the name."""
        if state[1] in ("<", ">") and self.name[:1] not in "<>|=":
            self.name = state[1] + self.name

    def decoded(self, data: Any, count: int) -> list[Any]:
        """The items of an array."""
        if not isinstance(self.name, str) or not _DTYPE.fullmatch(self.name):
            raise _Refused(f"the array type {self.name!r}")
        if "O" in self.name:
            if not isinstance(data, list):
                raise ValueError("an array of objects has no list of them")
            return data
        data = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(data, np.dtype(self.name), count).tolist()


class _Array:
    """The parts of an array."""

    shape: Any = ()
    items: list[Any]

    def __setstate__(self, state: Any) -> None:
        _, self.shape, dtype, columns_first, data = state
        if not isinstance(dtype, _Dtype) or not all(isinstance(side, int) and side >= 0 for side in self.shape):
            raise ValueError("an array without a type or shape")
        if columns_first and len(self.shape) > 1:
            raise ValueError("an array in column order")
        self.items = dtype.decoded(data, math.prod(self.shape))
        if len(self.items) != math.prod(self.shape):
            raise ValueError("an array with too many or too few items")


class _Unpickler(pickle.Unpickler):
    """Knows the few names that arrays of plain data are pickled with; they lead to the stand-ins above."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in.

        Raises:
            _Refused: for every other name.
        """
        module = module.replace("numpy._core", "numpy.core")
        known = {
            ("numpy.core.multiarray", "_reconstruct"): self._array,
            ("numpy.core.multiarray", "scalar"): self._scalar,
            ("numpy", "dtype"): self._dtype,
            ("numpy", "ndarray"): "ndarray",
            ("_codecs", "encode"): self._encode,
            ("__builtin__", "bytes"): self._empty,
        }
        if (module, name) not in known:
            raise _Refused(f"{module}.{name}")
        return known[module, name]

    def _array(self, *_: Any) -> _Array:
        return _Array()

    def _dtype(self, name: Any, *_: Any) -> _Dtype:
        return _Dtype(name)

    def _scalar(self, dtype: Any, data: Any) -> Any:
        return dtype.decoded([data] if "O" in str(dtype.name) else data, 1)[0]

    def _empty(self) -> bytes:
        return b""  # the old protocols' way to write it

    def _encode(self, text: Any, encoding: Any) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise _Refused(f"the encoding {encoding!r}")
        return text.encode("latin1")


def _plain(value: Any, path: Path, depth: int = 0) -> Any:
    """The value with arrays as nested lists."""
    if depth > 20:
        raise TaskError("a pickle that is nested too deeply", str(path), "Fetch it again")
    if isinstance(value, _Array):
        items = [_plain(item, path, depth + 1) for item in value.items]
        for side in reversed(value.shape[1:]):
            items = [items[i : i + side] for i in range(0, len(items), side)] if side else []
        return items if value.shape else items[0]
    if isinstance(value, dict):
        return {_plain(k, path, depth + 1): _plain(v, path, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, path, depth + 1) for item in value]
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    raise _Refused(f"a {type(value).__name__}")
