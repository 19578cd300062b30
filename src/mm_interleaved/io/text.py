"""Reads text and JSON: strict UTF-8, no lone surrogates, checked types. Errors name the file, line and column."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar, cast, overload

from .errors import InputError

T = TypeVar("T")

MAX_FILE = 8 << 30  # bytes of a JSON file that is read at once; the largest official annotation file has about 1 GiB
MAX_LINE = 1 << 26  # bytes of a line of a JSON-lines file


def check_text(text: str, where: str = "") -> str:
    r"""Return `text`, which must not have a lone surrogate: JSON can escape one (`"\ud83d"`), but UTF-8 cannot hold it.

    Raises:
        InputError: it has one.
    """
    if not text.isascii() and (half := re.search("[\ud800-\udfff]", text)):  # most texts are ASCII, which Python knows
        raise InputError(f"lone surrogate \\u{ord(half[0]):04x} (half a character) at position {half.start()}", where,
                         "Write the whole character, or remove it", "with a lone surrogate")  # fmt: skip
    return text


def check_strings(value: Any, where: str = "") -> None:
    """`check_text` for every string and every key of a parsed JSON value.

    Raises:
        InputError: a string has a lone surrogate; the message names the key.
    """
    rest: list[tuple[str, Any]] = [(where, value)]
    while rest:
        place, item = rest.pop()
        if isinstance(item, str):
            check_text(item, place)
        elif isinstance(item, (list, tuple)):
            rest += [(f"{place}[{i}]", one) for i, one in reversed(list(enumerate(cast(list[Any], item))))]
        elif isinstance(item, Mapping):
            for key, one in reversed([*cast(Mapping[Any, Any], item).items()]):
                rest.append((f"{place}.{key}" if place else str(key), one))
                if isinstance(key, str):
                    rest.append((f"{place}, a field's name" if place else "a field's name", key))


_TYPES: dict[type, str] = {dict: "an object", list: "a list", str: "a string", int: "a whole number",
                           float: "a number", bool: "true or false"}  # fmt: skip


@overload
def check_type(value: Any, kind: type[dict[str, Any]], where: str, fix: str = "") -> dict[str, Any]: ...


@overload
def check_type(value: Any, kind: type[list[Any]], where: str, fix: str = "") -> list[Any]: ...


@overload
def check_type(value: Any, kind: type[T], where: str, fix: str = "") -> T: ...


def check_type(value: Any, kind: type[T], where: str, fix: str = "") -> T:
    """Return `value`, which must be of that JSON type. An integer is also a number; a Boolean is not.

    Raises:
        InputError: it is of another type.
    """
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (kind in (int, float) and isinstance(value, bool)):
        found = "null" if value is None else _TYPES.get(type(value), type(value).__name__)
        raise InputError(f"must be {_TYPES[kind]}, not {found}", where, fix, "malformed")
    return cast(T, value)


def check_list(value: Any, kind: type[T], where: str) -> list[T]:
    """Return `value`, which must be a list whose items are of that JSON type.

    Raises:
        InputError: it is not; the message names the item.
    """
    return [check_type(item, kind, f"{where}[{i}]") for i, item in enumerate(check_type(value, list, where))]


def decode_text(data: bytes, where: str = "") -> str:
    """Decode UTF-8 and remove a byte order mark.

    Raises:
        InputError: they are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})", where, "Save it as UTF-8", "not UTF-8") from None


def read_text(path: str | Path, limit: int = MAX_FILE) -> str:
    """The text of a UTF-8 file.

    Raises:
        InputError: it is missing, larger than `limit` bytes, not a file, or not UTF-8.
    """
    with _reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise InputError(f"{size} bytes are too many, at most {limit}", str(path), "Give another file", "too large")
        return decode_text(file.read(), str(path))


@contextmanager
def _reading(path: str | Path) -> Iterator[IO[bytes]]:
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise InputError("the file does not exist", str(path), "Check the path", "missing") from None
    except (OSError, ValueError) as error:  # ValueError: a null character or a lone surrogate in the path
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot be read: {reason}", str(path), "Check the path", "unreadable") from None


def parse_json(data: str | bytes, where: str = "", *, strict: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        data: the text, or its bytes in UTF-8.
        where: the place to name in errors.
        strict: refuse lone surrogates and objects with two values for one key. False for downloaded data, where one bad
            record must not stop the reading; `check_strings` then checks each record.

    Raises:
        InputError: it is not UTF-8, empty, not exactly one JSON value, nested too deeply, or has a number of too many
            digits; the message names the line, if there are several, and the column.
    """
    text = decode_text(data, where) if isinstance(data, bytes) else data
    if not text.strip():
        raise InputError("empty, where JSON was expected", where, "Write or fetch it again", "empty")
    try:
        value = json.loads(text, object_pairs_hook=_distinct if strict else None)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""  # `where` names the line of a JSON-lines file
        problem = f"not JSON: {error.msg.removesuffix(' at')} at {line}column {error.colno}"
        raise InputError(
            problem, where, "Correct it; if it is cut short, write or fetch it again", "not JSON"
        ) from None
    except RecursionError:
        raise InputError("the JSON is nested too deeply", where, "Flatten it", "not JSON") from None
    except _DuplicateKey as error:
        raise InputError(f"the key '{error}' stands twice in one object", where, "Remove one of the two",
                         "with a key twice") from None  # fmt: skip
    except ValueError:  # Python refuses integers of thousands of digits
        raise InputError("a number is too long to be read", where, "Shorten it, or put it in quotes",
                         "not JSON") from None  # fmt: skip
    if strict and re.search(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]", text):  # otherwise no string can have a surrogate
        try:
            check_strings(value)
        except InputError as error:
            raise (error.at(where) if where else error) from None
    return value


class _DuplicateKey(Exception):
    """An object has two values for one key."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return found


def read_json(path: str | Path, kind: type = object, *, strict: bool = True, limit: int = MAX_FILE) -> Any:
    """The value of a JSON file, which must be of that JSON type; `object` allows any.

    Raises:
        InputError: as `read_text` and `parse_json`, or it is of another type.
    """
    value = parse_json(read_text(path, limit), str(path), strict=strict)
    return value if kind is object else check_type(value, kind, str(path))


def read_lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """(place, bytes) for every line of a file; empty lines are skipped.

    Raises:
        InputError: the file cannot be read or is empty, or a line is longer than `MAX_LINE`.
    """
    found = False
    with _reading(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            where = f"{path}, line {number}"
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                raise InputError(f"longer than {MAX_LINE} bytes", where, "Write one record a line", "too large")
            if line.strip():
                found = True
                yield where, line
    if not found:
        raise InputError("the file is empty", str(path), "Write or fetch it again", "empty")


def read_json_lines(path: str | Path, *, strict: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) for every line of a JSON-lines file; empty lines are skipped.

    Raises:
        InputError: as `read_lines`, or a line is not UTF-8 or not a JSON object.
    """
    for where, line in read_lines(path):
        yield where, check_type(parse_json(line, where, strict=strict), dict, where)
