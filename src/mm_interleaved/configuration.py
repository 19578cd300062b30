"""YAML files and `key=value` overrides as validated settings.

    config = load_config("configs/debug.yaml", TrainConfig, ["optimizer.lr=1e-4", "data.sources.0.seed=7"])

A file may have `extends: other.yaml` (a path, or a list of paths, relative to it) and only the values that differ:
mappings are merged key by key, lists are replaced. `${other.key}` refers to another value, `${oc.env:NAME}` to the
environment. OmegaConf loads and merges, pydantic validates (`validation.py`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigIndexError, ConfigTypeError, MissingMandatoryValue, OmegaConfBaseException
from pydantic import TypeAdapter

from .validation import ConfigError, parse, short

T = TypeVar("T")
EXTENDS = "extends"
_PART = r"[^\s.\[\]]+"
_KEY = rf"({_PART}|\[{_PART}\])(\.{_PART}|\[{_PART}\])*"  # of an override


def load_config(
    path: str | Path,
    schema: type[T],
    overrides: Sequence[str] = (),
    partial: bool = False,
    over: Sequence[str | Path | dict[str, Any]] = (),
    library: Path | None = None,
) -> T:
    """A YAML file with overrides, as an instance of a settings class.

    Args:
        path: the file.
        schema: a class that `validation.settings` made.
        overrides: `key.sub=value`; list items are named by number (`sources.0.type` or `sources[0].type`), values are
            YAML.
        partial: ignore top-level keys that the schema lacks, since the file belongs to a larger schema.
        over: further files or values by key, which replace those of the file, each those of the ones before.
        library: folder of files that `extends` may name, too.

    Raises:
        ConfigError: the file or an override cannot be read, or a key is unknown, missing or of the wrong type.
    """
    data = _load(Path(path), (), library)
    for other in over:
        data = _merge(data, other if isinstance(other, dict) else _load(Path(other), ()))
    return _validated(data, schema, overrides, str(path), partial)


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file with overrides as plain data, which no schema has checked.

    Raises:
        ConfigError: the file or an override cannot be read.
    """
    return _resolved(_load(Path(path), ()), overrides, _origin(overrides, str(path)))


def list_keys(path: str | Path, library: Path | None = None) -> list[str]:
    """The top-level keys of a YAML file and of those that it extends; for `library` see `load_config`.

    Raises:
        ConfigError: a file cannot be read.
    """
    return list(_load(Path(path), (), library))


def make_config(data: dict[str, Any], schema: type[T], overrides: Sequence[str] = (), where: str = "settings") -> T:
    """Plain data with overrides, as an instance of a settings class; like `load_config`, without a file.

    Args:
        data: values by key.
        schema, overrides: as for `load_config`.
        where: the name of the data in errors.

    Raises:
        ConfigError: as `load_config`.
    """
    return _validated(data, schema, overrides, where)


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`key.sub=value` arguments as nested plain data.

    Raises:
        ConfigError: one of them is not written so.
    """
    return _resolved({}, overrides, _origin(overrides, "the arguments"))


def to_yaml(config: Any) -> str:
    """A settings object as YAML that `load_config` reads back."""
    data = TypeAdapter(type(config)).dump_python(config, mode="json", by_alias=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def _validated(
    given: dict[str, Any], schema: type[T], overrides: Sequence[str], where: str, partial: bool = False
) -> T:
    origin = _origin(overrides, where)
    data = _resolved(given, overrides, origin)
    if partial:
        known = [field.name for field in dataclasses.fields(cast(Any, schema))]
        data = {key: value for key, value in data.items() if key in known}
    return parse(data, schema, origin)


def _origin(overrides: Sequence[str], where: str) -> Callable[[Sequence[str | int]], str]:
    """A function that names what sets the value at a path: an override, the file, or both."""

    def origin(path: Sequence[str | int]) -> str:
        names = [str(key) for key in path]
        for override in reversed(overrides):
            parts = _parts(override)
            if parts == names[: len(parts)]:
                return f"override '{override}'"
            if names and names == parts[: len(names)]:
                return f"{where} with override '{override}'"
        return where

    return origin


def _resolved(
    given: dict[str, Any], overrides: Sequence[str], origin: Callable[[Sequence[str | int]], str]
) -> dict[str, Any]:
    """The data with overrides and references resolved."""
    merged = OmegaConf.create(given)
    for override in overrides:
        _apply(merged, override)
    try:
        return cast("dict[str, Any]", OmegaConf.to_container(merged, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        key = error.full_key or ""
        raise ConfigError(f"{key} must be given ({origin(_parts(key))}). Add {key}=VALUE") from None
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        place = f"{key} in " if key else ""
        raise ConfigError(f"{_first_line(error)} ({place}{origin(_parts(key))})") from None


def _apply(merged: DictConfig, override: str) -> None:
    where = f"override '{override}'"
    key = override.partition("=")[0].strip()
    if "=" not in override or not re.fullmatch(_KEY, key):
        raise ConfigError(f"{where} must have the form key=value or key.sub=value")
    try:
        merged.merge_with_dotlist([override.strip()])
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value of {where} is not YAML: {_first_line(error)}", fix=f"Put quotes around it: '{key}=\"...\"'"
        ) from None
    except ConfigTypeError:
        raise ConfigError(f"{where} gives a list in place of a mapping, or a mapping in place of a list") from None
    except (ConfigIndexError, ValueError, TypeError):  # TypeError: the key of a list's item is not a number
        raise ConfigError(f"there is no such list item: {where}. Items are named by number, from 0") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_first_line(error)} ({where})") from None


def _parts(override: str) -> list[str]:
    """The keys of `sources[0].type=x` or of `sources[0].type`: `["sources", "0", "type"]`."""
    return [part for part in re.split(r"[.\[\]]+", override.partition("=")[0].strip()) if part]


def _load(path: Path, above: tuple[Path, ...], library: Path | None = None) -> dict[str, Any]:
    """A file, merged over those that it extends."""
    if path.resolve() in above:
        raise ConfigError(f"{path} extends itself through {' and '.join(p.name for p in above)}")
    data = _read(path)
    extends = data.pop(EXTENDS, None)
    bases = [extends] if isinstance(extends, str) else [] if extends is None else extends
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{EXTENDS} must be the path of a file or a list of them, not {short(extends)} ({path})")
    merged: dict[str, Any] = {}
    for base in bases:
        beside = path.parent / base
        found = library / base if library is not None and not beside.exists() else beside
        merged = _merge(merged, _load(found, (*above, path.resolve()), library))
    return _merge(merged, data)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`: mappings are merged key by key, all else is replaced, also by other types."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read(path: Path) -> dict[str, Any]:
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
    return cast("dict[str, Any]", OmegaConf.to_container(data))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def describe_differences(old: Any, new: Any, most: int = 3) -> str:
    """The differences of two JSON values, as "'text.num_beams' was 5 and is now 3"; "": they are equal."""
    found = list(_differences(old, new))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (*old, *(k for k in new if k not in old)):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"'{name}' was {json.dumps(old, ensure_ascii=False)} and is now {json.dumps(new, ensure_ascii=False)}"
