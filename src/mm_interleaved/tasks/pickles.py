"""Reads the pickles of some data sets without running code in them.

Containers, strings, bytes and numbers are read directly. NumPy arrays are rebuilt from their parts here, without
NumPy's unpickling. Anything else is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ..io import InputError

_DTYPE = re.compile(r"[<>|=]?(?:O8?|[SU]\d*|[iufb]\d+)")
_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: "<B", pickletools.TAKEN_FROM_ARGUMENT4: "<i",
    pickletools.TAKEN_FROM_ARGUMENT4U: "<I", pickletools.TAKEN_FROM_ARGUMENT8U: "<Q",
}  # fmt: skip  # how an argument says its length
_BROKEN = (pickle.UnpicklingError, struct.error, EOFError, AttributeError, ValueError, IndexError, KeyError, TypeError,
           ImportError, OverflowError, MemoryError)  # fmt: skip


def read_pickle(path: Path) -> Any:
    """Read a pickle of plain data: dicts, lists, tuples, strings, bytes, numbers. Arrays become lists.

    Raises:
        InputError: it cannot be read, or has anything else.
    """
    return _load(_bytes(path), path)


def read_npy(path: Path) -> Any:
    """The array of an `.npy` file as nested lists, or its only object. It may have pickled objects.

    Raises:
        InputError: it cannot be read, or has anything but plain data.
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
        raise InputError(f"not an .npy file that can be read: {error}", str(path), "Fetch it again") from None
    value = _load(content[file.tell() :], path)
    return value[0] if shape == () and isinstance(value, list) and len(value) == 1 else value


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", str(path)) from None


def _load(content: bytes, path: Path) -> Any:
    try:
        _check_memo(content)
        return _Plain(path, len(content)).of(_Unpickler(io.BytesIO(content), encoding="latin1").load())
    except _Refused as error:
        raise InputError(f"the pickle asks for {error}, which plain data does not need; it was not run", str(path),
                         "Do not trust this file; fetch it again from its owners") from None  # fmt: skip
    except _BROKEN as error:
        raise InputError(f"a broken pickle: {error}", str(path), "Fetch it again") from None
    except RecursionError:
        raise InputError("a pickle that is nested too deeply", str(path), "Fetch it again") from None


def _check_memo(content: bytes) -> None:
    """Refuse memo indices that are larger than the file: the unpickler allocates memory for all lower indices.

    Raises:
        ValueError: there is such an index, or it is not a pickle.
    """
    place, name = 0, ""
    while name != "STOP":
        opcode = _OPCODES[content[place]]
        name, argument = opcode.name, opcode.arg
        begin = place = place + 1
        size = 0 if argument is None else argument.n
        if argument is not None and size == pickletools.UP_TO_NEWLINE:
            for _ in range(2 if argument.name.endswith("_pair") else 1):
                place = content.index(b"\n", place) + 1
        elif size in _LENGTHS:
            (length,) = struct.unpack_from(_LENGTHS[size], content, begin)
            if length < 0:
                raise ValueError(f"it has an argument of {length} bytes")
            place += struct.calcsize(_LENGTHS[size]) + length
        else:
            place += size
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            number = int(content[begin:place]) if name == "PUT" else int.from_bytes(content[begin:place], "little")
            if not 0 <= number <= len(content):
                raise ValueError(f"it keeps a value under number {number}, and has {len(content)} bytes")


class _Refused(Exception):
    """A pickle has something that is not allowed, which the message names."""


class _Dtype:
    """The data type of an array."""

    def __init__(self, name: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """The state is (version, byte order, ...); a given byte order is put in front of the name."""
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
    """Maps the few names in pickles of plain arrays to the substitutes above."""

    def find_class(self, module: str, name: str) -> Any:
        """The substitute for a name.

        Raises:
            _Refused: the name has none.
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
        return b""  # how the old protocols write it

    def _encode(self, text: Any, encoding: Any) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise _Refused(f"the encoding {encoding!r}")
        return text.encode("latin1")


class _Plain:
    """Converts arrays to nested lists. A small pickle can refer to one list many times and so expand to very many
    values; more than a multiple of its bytes are refused.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.left = path, 4 * size

    def of(self, value: Any, depth: int = 0) -> Any:
        """Convert a value to plain data."""
        self.left -= 1
        if depth > 20 or self.left < 0:
            problem = "is nested too deeply" if depth > 20 else "repeats its parts too often"
            raise InputError(f"a pickle that {problem}", str(self.path), "Fetch it again")
        if isinstance(value, _Array):
            items = [self.of(item, depth + 1) for item in value.items]
            for side in reversed(value.shape[1:]):
                items = [items[i : i + side] for i in range(0, len(items), side)] if side else []
            return items if value.shape else items[0]
        if isinstance(value, dict):
            return {self.of(k, depth + 1): self.of(v, depth + 1) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(item, depth + 1) for item in value]
        if value is None or isinstance(value, (str, bytes, int, float)):
            return value
        raise _Refused(f"a {type(value).__name__}")
