"""Settings in dataclasses: values are converted to the declared types, or refused in words that name the setting.

    @dataclass(frozen=True)
    class Settings:
        max_new_tokens: int = count_field(30, least=1)
        temperature: float = number_field(1.0, least=1e-6)

        def __post_init__(self) -> None:
            validate(self)

The types are those of the fields: `int`, `float`, `bool`, `str`, a `Literal`, another dataclass, each with or without
`None`. A whole number may come from NumPy or PyTorch, but is no bool and has no fraction; a float is finite.
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any

import numpy as np

COUNT_LIMIT = 2**31  # no count reaches it, and products of a few counts fit into 64 bits
SEED_LIMIT = 2**63  # torch takes seeds below 2**64; the rest is room for `seed + candidate + turn`


@dataclass(frozen=True)
class Bounds:
    """The range of a number.

    Attributes:
        least, most: the smallest and the largest value.
        above, below: limits that are not allowed themselves.
        advice: what to do about a value outside, for messages.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    advice: str = ""

    def hold(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = (("at least", self.least), ("at most", self.most), ("greater than", self.above),
                 ("less than", self.below))  # fmt: skip
        return " and ".join(f"{word} {_short(limit)}" for word, limit in words if limit is not None)


SEEDS = Bounds(least=0, below=SEED_LIMIT)


def number_field(default: Any, advice: str = "", **limits: float) -> Any:
    """A dataclass field with a number in the range of `limits`; see `Bounds`."""
    return field(default=default, metadata={"bounds": Bounds(**limits, advice=advice)})


def count_field(default: Any, least: int) -> Any:
    """A dataclass field with a whole number from `least` on."""
    return field(default=default, metadata={"bounds": Bounds(least=least, below=COUNT_LIMIT)})


def seed_field(default: int) -> Any:
    """A dataclass field with the seed of a random generator."""
    return field(default=default, metadata={"bounds": SEEDS})


def validate(settings: Any) -> None:
    """Convert the fields of a dataclass instance to their types, in place.

    Raises:
        ValueError: a value has another type or lies outside the range of its field; names the field.
    """
    for name, kinds, bounds in _declared(type(settings)):
        object.__setattr__(settings, name, _converted(name, getattr(settings, name), kinds, bounds))


def check_seed(value: Any) -> int:
    """`value` as the seed of a random generator.

    Raises:
        ValueError: it is no whole number, negative, or not below `SEED_LIMIT`.
    """
    return _converted("seed", value, (int,), SEEDS)


def check_count(name: str, value: Any, least: int) -> int:
    """`value` as a whole number from `least` on; `name` is how messages call it.

    Raises:
        ValueError: it is something else.
    """
    return _converted(name, value, (int,), Bounds(least=least, below=COUNT_LIMIT))


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Words that end a message about the unknown name `name`: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


@cache
def _declared(cls: type) -> list[tuple[str, tuple[Any, ...], Bounds]]:
    """Name, possible types and range of every field."""
    hints = typing.get_type_hints(cls)
    found = []
    for item in fields(cls):
        hint = hints[item.name]
        union = type(hint).__name__ == "UnionType" or typing.get_origin(hint) is typing.Union
        found.append((item.name, typing.get_args(hint) if union else (hint,), item.metadata.get("bounds", Bounds())))
    return found


def _converted(name: str, value: Any, kinds: tuple[Any, ...], bounds: Bounds) -> Any:
    if value is None and NoneType in kinds:
        return None
    (kind,) = (k for k in kinds if k is not NoneType)
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if not (isinstance(value, str) and value in choices):
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {_short(value)}")
        return str(value)
    if kind is bool and isinstance(value, (bool, np.bool_)):
        return bool(value)
    if kind is int:
        return _in_range(name, _whole(name, value), bounds)
    if kind is float:
        return _in_range(name, _real(name, value), bounds)
    if kind is str and isinstance(value, str):
        return str(value)
    if kind not in (bool, str) and isinstance(value, kind):
        return value
    wanted = {bool: "True or False", str: "a string"}.get(kind, f"a {getattr(kind, '__name__', kind)}")
    raise ValueError(f"{name} must be {wanted}, not {_short(value)}")


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, (bool, np.bool_)) or "bool" in str(getattr(value, "dtype", "")):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {_short(value)}") from None


def _real(name: str, value: Any) -> float:
    try:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
            raise TypeError
        converted = float(value)
    except TypeError:
        raise ValueError(f"{name} must be a number, not {_short(value)}") from None
    except OverflowError:
        converted = math.inf
    if not math.isfinite(converted):
        raise ValueError(f"{name} must be a finite number, not {_short(value)}")
    return converted


def _in_range(name: str, value: float, bounds: Bounds) -> Any:
    if not bounds.hold(value):
        raise ValueError(f"{name} must be {bounds}, not {_short(value)}"
                         + (f"; {bounds.advice}" if bounds.advice else ""))  # fmt: skip
    return value


def _short(value: Any) -> str:
    """`value` in a message; huge numbers as powers of two or cut."""
    for power in (31, 63):
        if type(value) is int and value == 2**power:
            return f"2**{power}"
    if type(value) is int and value.bit_length() > 128:  # Python refuses to write out thousands of digits
        return f"a number of {value.bit_length()} bits"
    words = repr(value) if isinstance(value, str) else str(value)
    return words if len(words) <= 40 else words[:40] + "..."
