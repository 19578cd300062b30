"""YAML files and `key=value` overrides as typed dataclasses.

    config = load_config("configs/small.yaml", TrainConfig, ["optimizer.lr=1e-4", "data.sources.0.seed=7"])

A file may say `extends: other.yaml` (a path, or a list of paths, relative to it) and then holds only what differs:
mappings are merged key by key, lists are replaced. `${other.key}` refers to another value,
`${oc.env:NAME}` to the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import math
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

T = TypeVar("T")
EXTENDS = "extends"
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", Path: "a path",
          list: "a list", dict: "a mapping"}  # fmt: skip


class ConfigError(ValueError):
    """A configuration that cannot be used: what is wrong, where, and what to do about it."""


def load_config(path: str | Path, schema: type[T], overrides: Sequence[str] = (), partial: bool = False) -> T:
    """A YAML file with overrides, as an instance of a dataclass.

    Args:
        path: the file.
        schema: a dataclass, with nested dataclasses, lists and mappings of them. Fields without a default and those
            with `omegaconf.MISSING` must be given. A `ValueError` from its `__post_init__` is reported with the file.
        overrides: `key.sub=value`; list items are named by number (`sources.0.type` or `sources[0].type`), values are
            YAML.
        partial: leave alone what the schema's top level lacks; the file belongs to a larger schema.

    Raises:
        ConfigError: the file or an override cannot be read, or a key is unknown, missing or of the wrong type.
    """
    data = _load(Path(path), ())
    if partial:
        known = _fields(schema) or []
        data = OmegaConf.masked_copy(data, [key for key in data if key in known])
        overrides = [o for o in overrides if re.split(r"[.=\[]", o.strip())[0] in known]
    return _build(data, schema, overrides, str(path))


def make_config(data: dict[str, Any], schema: type[T], overrides: Sequence[str] = (), where: str = "settings") -> T:
    """Plain data with overrides, as an instance of a dataclass; like `load_config`, without a file.

    Args:
        data: values by key.
        schema, overrides: as for `load_config`.
        where: how errors call the data.

    Raises:
        ConfigError: as `load_config`.
    """
    return _build(OmegaConf.create(data), schema, overrides, where)


def _build(data: DictConfig, schema: type[T], overrides: Sequence[str], where: str) -> T:
    config = _merge(OmegaConf.structured(schema), data, schema, where)
    for override in overrides:
        config = _override(config, schema, override)
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(f"{where}: '{missing[0]}' must be given")
        return cast(T, OmegaConf.to_object(config))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{where}: '{error.full_key}' must be given") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def to_yaml(config: Any) -> str:
    """A dataclass instance as YAML that `load_config` reads back."""
    data = _plain(OmegaConf.to_container(OmegaConf.structured(config), resolve=False))
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, enum.Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def _load(path: Path, above: tuple[Path, ...]) -> DictConfig:
    """A file, merged over those that it extends."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: extends itself through {' and '.join(p.name for p in above)}")
    data = _read(path)
    extends = data.pop(EXTENDS, None) or []
    bases = [extends] if isinstance(extends, str) else list(extends)
    if not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: '{EXTENDS}' must be the path of a file or a list of them")
    loaded = [_load(path.parent / base, (*above, path.resolve())) for base in bases]
    return cast(DictConfig, OmegaConf.merge(*loaded, data))


def _read(path: Path) -> DictConfig:
    try:
        data = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML text: {_first_line(error)}") from None
    except OSError as error:
        # OmegaConf raises one without errno for a file that holds a single scalar.
        raise ConfigError(f"{path}: {error.strerror or 'must be a mapping of keys to values'}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from None
    if not isinstance(data, DictConfig):
        raise ConfigError(f"{path}: must be a mapping of keys to values, not a list")
    if not data:
        raise ConfigError(f"{path}: the file is empty")
    return data


def _merge(config: DictConfig, data: DictConfig, schema: type, where: str) -> DictConfig:
    content = OmegaConf.to_container(data, resolve=False)
    _check_keys(content, schema, "", where)
    _check_finite(content, "", where)
    try:
        return cast(DictConfig, OmegaConf.merge(config, data))
    except (OmegaConfBaseException, TypeError) as error:
        key, kind, value = _culprit("", schema, content)
        raise _type_error(where, key, kind, value, error) from None


def _override(config: DictConfig, schema: type, override: str) -> DictConfig:
    where = f"override '{override}'"
    key, equals, text = override.partition("=")
    parts = [p for p in re.split(r"[.\[\]]+", key.strip()) if p]
    if not equals or not parts or re.search(r"\s", key.strip()):
        raise ConfigError(f"{where}: write key=value or key.sub=value")
    try:
        document = OmegaConf.create(f"value: {text}" if text.strip() else "value: null")
        value = cast(dict[str, Any], OmegaConf.to_container(document, resolve=False))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{where}: the value is not YAML: {_first_line(error)}") from None
    nested: Any = value
    for part in reversed(parts):
        nested = {part: nested}
    _check_keys(nested, schema, "", where)
    _check_finite(nested, "", where)
    changed = config.copy()
    try:
        _set(changed, parts, value)
    except (OmegaConfBaseException, TypeError) as error:
        kind: Any = schema
        for part in parts:
            kind = _inner(kind, part)
        raise _type_error(where, ".".join(parts), kind, value, error) from None
    except IndexError as error:
        raise ConfigError(f"{where}: {error}") from None
    return changed


def _set(node: Any, parts: list[str], value: Any) -> None:
    head, rest = parts[0], parts[1:]
    if isinstance(node, ListConfig):
        if not head.isdigit() or int(head) >= len(node):
            raise IndexError(f"there is no list item {head}, only {len(node)}")
        if rest:
            _set(node[int(head)], rest, value)
        else:
            node[int(head)] = value
    elif rest and isinstance(node.get(head), (ListConfig, DictConfig)):
        _set(node[head], rest, value)
    else:
        for part in reversed(rest):
            value = {part: value}
        node.merge_with({head: value})


# ---- messages


def _check_keys(data: Any, kind: Any, prefix: str, where: str) -> None:
    """Refuse what the schema does not know, with the nearest name that it knows."""
    if not isinstance(data, (dict, list)):
        return
    fields = _fields(kind)
    if fields is not None and isinstance(data, dict):
        for key in data:
            if str(key) not in fields:
                close = difflib.get_close_matches(str(key), fields, n=1)
                hint = f"did you mean '{prefix}{close[0]}'?" if close else f"known: {', '.join(fields)}"
                raise ConfigError(f"{where}: unknown key '{prefix}{key}'; {hint}")
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        _check_keys(value, _inner(kind, str(key)), f"{prefix}{key}.", where)


def _check_finite(data: Any, key: str, where: str) -> None:
    """Refuse NaN and infinite numbers: comparisons let them pass, and no setting means anything with them."""
    if isinstance(data, float) and not math.isfinite(data):
        raise ConfigError(f"{where}: '{key}' must be a finite number, not {data}")
    if isinstance(data, (dict, list)):
        for name, value in data.items() if isinstance(data, dict) else enumerate(data):
            _check_finite(value, f"{key}.{name}" if key else str(name), where)


def _alternatives(kind: Any) -> list[Any]:
    """The types of a union, without None."""
    if typing.get_origin(kind) is typing.Union or type(kind).__name__ == "UnionType":
        return [a for a in typing.get_args(kind) if a is not type(None)]
    return [kind]


def _fields(kind: Any) -> list[str] | None:
    """The fields of a dataclass; None for anything else."""
    kinds = [k for k in _alternatives(kind) if dataclasses.is_dataclass(k)]
    return [f.name for f in dataclasses.fields(kinds[0])] if kinds else None


def _inner(kind: Any, key: str) -> Any:
    """The type of what lies under `key`; None: unknown."""
    for option in _alternatives(kind):
        if dataclasses.is_dataclass(option):
            return typing.get_type_hints(option).get(key)
        if arguments := typing.get_args(option):
            return arguments[-1] if typing.get_origin(option) is dict else arguments[0]
    return None


def _culprit(key: str, kind: Any, value: Any) -> tuple[str, Any, Any]:
    """The innermost value that does not fit its type: its key, the type, and itself."""
    kinds = [k for k in _alternatives(kind) if dataclasses.is_dataclass(k)]
    if kinds and isinstance(value, dict):
        for name, inner in value.items():
            try:
                OmegaConf.merge(OmegaConf.structured(kinds[0]), {name: inner})
            except (OmegaConfBaseException, TypeError):
                return _culprit(f"{key}.{name}" if key else name, _inner(kinds[0], name), inner)
    if isinstance(value, list):
        for index, item in enumerate(value):
            found = _culprit(f"{key}.{index}", _inner(kind, str(index)), item)
            if found[2] is not item:
                return found
    return key, kind, value


def _type_error(where: str, key: str, kind: Any, value: Any, error: Exception) -> ConfigError:
    if kind is None or not key:
        return ConfigError(f"{where}: '{key}': {_first_line(error)}")
    return ConfigError(f"{where}: '{key}' must be {_describe(kind)}, not {value!r} ({type(value).__name__})")


def _describe(kind: Any) -> str:
    names = []
    for option in _alternatives(kind):
        origin = typing.get_origin(option) or option
        if origin is typing.Literal:
            names.append("one of " + ", ".join(repr(a) for a in typing.get_args(option)))
        elif isinstance(origin, type) and issubclass(origin, enum.Enum):
            names.append("one of " + ", ".join(origin.__members__))
        else:
            is_group = dataclasses.is_dataclass(origin)
            names.append(_NAMES[dict] if is_group else _NAMES.get(origin, str(getattr(origin, "__name__", origin))))
    return " or ".join(names)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def describe_differences(old: Any, new: Any, most: int = 3) -> str:
    """What differs between two JSON values, as "'text.num_beams' was 5 and is now 3"; "" if nothing does."""
    found = list(_differences(old, new))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (*old, *(k for k in new if k not in old)):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"'{name}' was {json.dumps(old, ensure_ascii=False)} and is now {json.dumps(new, ensure_ascii=False)}"
