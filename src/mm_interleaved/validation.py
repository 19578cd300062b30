"""Settings as pydantic dataclasses: strict types, ranges, and errors that name the setting and the nearest known name.

    @settings
    class Sampling:
        max_new_tokens: Positive = 30
        temperature: float = 1.0

A NumPy or PyTorch integer is also an integer, but a bool is not. Floats are finite. Instances are immutable;
`dataclasses.replace` makes a changed copy, which is validated.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, dataclass_transform, overload

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from .io import InputError, close_name, nearest_name, sentences

T = TypeVar("T")
Path = Sequence[str | int]

SEED_LIMIT = 2**63  # torch accepts seeds below 2**64; `seed + candidate + turn` must stay below it

Count = Annotated[int, Field(ge=0, lt=2**31)]  # products of a few counts fit into 64 bits
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a moving average

_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_by_name=True, validate_by_alias=True)


class ConfigError(InputError):
    """A setting that cannot be used: what is wrong, where, and what to do."""


@overload
def settings(cls: type[T], /) -> type[T]: ...
@overload
def settings(*, frozen: bool = True, kw_only: bool = False) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: Any = None, /, *, frozen: bool = True, kw_only: bool = False) -> Any:
    """Make a class a validated dataclass.

    A class attribute `RENAMED` maps former keys and values to an error message. A static method `suggest` of the class
    that a file is parsed as returns a sentence about an unknown key anywhere in the file, or "". A `ValueError` from
    `__post_init__` is reported with its place.

    Args:
        cls: class with annotated fields.
        frozen: whether instances are immutable.
        kw_only: whether fields are keyword-only.
    """
    if cls is None:
        return functools.partial(settings, frozen=frozen, kw_only=kw_only)
    made: Any = dataclass(config=_CONFIG, frozen=frozen, kw_only=kw_only)(cls)
    validated_init = made.__init__

    @functools.wraps(validated_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            validated_init(self, *map(_number, args), **{name: _number(value) for name, value in kwargs.items()})
        except ValidationError as error:
            raise ConfigError(explain(error, made)) from None

    made.__init__ = init
    return made


def _number(value: Any) -> Any:
    """Convert a NumPy or PyTorch number to a Python number."""
    return value.item() if getattr(value, "shape", None) == () else value


def parse(data: Mapping[str, Any], schema: type[T], source: str | Callable[[Path], str]) -> T:
    """Plain data as an instance of a settings class.

    Args:
        data: values by key.
        schema: the class.
        source: the name of the origin of the data, or of the value at a path, in errors.

    Raises:
        ConfigError: a key is unknown or missing, or a value is not allowed.
    """
    try:
        return TypeAdapter(schema).validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise ConfigError(explain(error, schema, source)) from None


def _origins(message: str, path: Path, source: str | Callable[[Path], str]) -> str:
    """The overrides of the settings that a message about an object names, or else the origin of the object."""
    if isinstance(source, str):
        return source
    found: list[str] = []
    for name in re.findall(r"[a-z_]\w*(?:\.\w+)*", message):
        keys: Path = [*name.split(".")]
        found += [source([*path, *keys]), source(keys)]  # a name starts at the object, or at the file
    return " and ".join(dict.fromkeys(o for o in found if not o.startswith(source([])))) or source(path)


def explain(error: ValidationError, schema: type, source: str | Callable[[Path], str] = "") -> str:
    """The message for the first problem that pydantic found, unknown keys before others.

    Args:
        error: pydantic's error.
        schema: the class that was validated.
        source: the file or argument of the values, or of the value at a path; "": none.
    """
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "unexpected_keyword_argument"), problems[0])
    path: Path = list(problem["loc"])
    value, kind = problem["input"], problem["type"]
    origin = source if isinstance(source, str) else source(path)
    owner = _type_at(schema, path[: max((i for i, key in enumerate(path) if isinstance(key, str)), default=0)])
    if kind == "unexpected_keyword_argument":
        place = f" in {_dotted(path[:-1])}" if len(path) > 1 else ""
        message = f"unknown key '{path[-1]}'{place}"
        name = str(path[-1])
        advice = _former(owner, name) or _suggestion(schema, name) or nearest_name(name, _fields(owner) or ())
    elif kind == "missing":
        message, advice = f"{_dotted(path)} must be given", ""
    elif kind == "value_error":
        found = problem.get("ctx", {})["error"]
        message, advice = (found.problem, found.fix) if isinstance(found, InputError) else (str(found), "")
        origin = " in ".join(part for part in (_dotted(path), _origins(message, path, source)) if part)
    else:
        words = re.sub(r"^\w+ should ", " must ", problem["msg"]).replace(" after validation", "")
        for theirs, ours in _WORDS.items():
            words = words.replace(theirs, ours)
        message = f"{_dotted(path)}{words if words.startswith(' must ') else f': {words}'}"
        if words.startswith(" must ") and ", not " not in words:  # which says how many items a list has
            is_json = origin and (value is None or isinstance(value, bool))  # not an argument in Python
            message += f", not {json.dumps(value) if is_json else short(value)}"
        choices = typing.get_args(_type_at(schema, path)) if kind == "literal_error" else ()
        advice = _former(owner, value) or close_name(str(value), choices)
    return sentences(message + (f" ({origin})" if origin else ""), advice)


# Replacements for words in pydantic's messages.
_WORDS = {"an object": "a mapping", "a valid array": "a list", "a valid boolean": "true or false", "a valid ": "a ",
          "an integer": "a whole number", "a integer": "a whole number", "a dictionary": "a mapping",
          "greater than or equal to": "at least", "less than or equal to": "at most"}  # fmt: skip


def _former(owner: Any, name: Any) -> str:
    """The message about a former key or value of a class."""
    renamed: Mapping[str, str] = getattr(owner, "RENAMED", {})
    return renamed.get(name, "") if isinstance(name, str) else ""


def _suggestion(schema: type, name: str) -> str:
    """What the schema says about a key that none of its parts knows; "": nothing."""
    suggest: Callable[[str], str] | None = getattr(schema, "suggest", None)
    return suggest(name) if suggest is not None else ""


def _dotted(path: Path) -> str:
    """`("data", "sources", 0)` as `data.sources[0]`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def _type_at(kind: Any, path: Path) -> Any:
    """The type at a path in a schema; None: unknown."""
    for key in path:
        fields = _fields(kind)
        if fields is not None:
            kind = fields[str(key)].annotation if key in fields else None
        else:
            kind = next(reversed(typing.get_args(kind)), None)
        if options := [k for k in typing.get_args(kind) if k is not type(None)] if _is_union(kind) else []:
            kind = options[0]
    return kind


def _fields(kind: Any) -> dict[str, FieldInfo] | None:
    """The fields of a settings class by their names in files; None: it is not a settings class."""
    fields: dict[str, FieldInfo] | None = getattr(kind, "__pydantic_fields__", None)
    return fields and {info.alias or name: info for name, info in fields.items()}


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def short(value: Any) -> str:
    """`value` for a message, shortened if it is long."""
    if type(value) is int and value.bit_length() > 128:  # Python refuses to write out thousands of digits
        return f"a number of {value.bit_length()} bits"
    words = repr(value)
    return words if len(words) <= 40 else words[:40] + "..."
