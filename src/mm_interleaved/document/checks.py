"""Decoded JSON, checked once at the edge; messages say what was found and where."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from .errors import DocumentError
from .segments import check_characters

T = TypeVar("T")
_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    bool: "true or false",
}


def check(value: Any, kind: type, where: str, fix: str = "") -> Any:
    """`value`, which must be of that JSON type."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        given = cast(type, type(value))
        found = "null" if value is None else _KINDS.get(given, given.__name__)
        raise DocumentError(f"must be {_KINDS[kind]}, not {found}", where, fix)
    return value


def check_all_characters(data: dict[str, Any]) -> None:
    """`check_characters` for every string of a decoded object."""
    rest: list[tuple[str, Any]] = [("", data)]
    while rest:
        where, value = rest.pop()
        if isinstance(value, str):
            check_characters(value, where)
        elif isinstance(value, list):
            rest += [(f"{where}[{i}]", item) for i, item in enumerate(cast(list[Any], value))]
        elif isinstance(value, dict):
            fields = cast(dict[Any, Any], value)
            rest += [(f"{where}, a field's name" if where else "a field's name", key) for key in fields]
            rest += [(f"{where}.{key}" if where else str(key), item) for key, item in fields.items()]


def check_list(value: Any, kind: type[T], where: str) -> list[T]:
    """`value`, which must be a list of things of that JSON type."""
    return [check(item, kind, f"{where}[{i}]") for i, item in enumerate(check(value, list, where))]


def check_fields(data: dict[str, Any], known: Sequence[str], where: str = "") -> None:
    """Refuse fields that are not `known`, naming the nearest that is."""
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            fix = f"Did you mean '{close[0]}'?" if close else f"Known fields: {', '.join(known)}"
            raise DocumentError(f"unknown field '{key}'", where, fix)


def listed(names: Any) -> str:
    """Names for a message."""
    return ", ".join(f"'{n}'" for n in names) or "nothing"


def positive(value: Any, where: str) -> int:
    """`value`, which must be a whole number from 1 on."""
    if check(value, int, where) < 1:
        raise DocumentError(f"must be at least 1, not {value}", where)
    return value
