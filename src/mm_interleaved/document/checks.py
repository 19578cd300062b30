"""Checks of the fields of JSON documents. The messages state what was found and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..io import InputError, check_type, nearest_name


def check_fields(data: dict[str, Any], known: Sequence[str], where: str = "") -> None:
    """Raise an `InputError` for a field that is not in `known`; the message suggests the most similar known field."""
    for key in data:
        if key not in known:
            raise InputError(f"unknown field '{key}'", where, nearest_name(str(key), known))


def listed(names: Any) -> str:
    """The names, quoted and joined for a message."""
    return ", ".join(f"'{n}'" for n in names) or "nothing"


def positive(value: Any, where: str) -> int:
    """Return `value`, which must be an integer of at least 1."""
    if check_type(value, int, where) < 1:
        raise InputError(f"must be at least 1, not {value}", where)
    return value
