"""Fields of documents in JSON, checked once at the edge; messages say what was found and where."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from ..io import InputError, check_type


def check_fields(data: dict[str, Any], known: Sequence[str], where: str = "") -> None:
    """Refuse fields that are not `known`, naming the nearest that is."""
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            fix = f"Did you mean '{close[0]}'?" if close else f"Known fields: {', '.join(known)}"
            raise InputError(f"unknown field '{key}'", where, fix)


def listed(names: Any) -> str:
    """Names for a message."""
    return ", ".join(f"'{n}'" for n in names) or "nothing"


def positive(value: Any, where: str) -> int:
    """`value`, which must be a whole number from 1 on."""
    if check_type(value, int, where) < 1:
        raise InputError(f"must be at least 1, not {value}", where)
    return value
