"""Registries of extensible values, and the plug-ins that extend them through entry points of their packages.

| group of entry points | registry | an entry point names |
|---|---|---|
| `mm_interleaved.sources` | `data.sources.SOURCES` | a `SourceType`: the settings and the reader of a type of source |
| `mm_interleaved.tasks` | `tasks.TASKS` | a `TaskType` |
| `mm_interleaved.tasks.facts` | `tasks.facts.FACTS` | a function that returns the `Facts` of a task, or None |
| `mm_interleaved.metrics` | `evaluation.scoring.METRICS` | a function from `ScoringInputs` to a `MetricResult` |
| `mm_interleaved.commands` | `cli.plugins.COMMANDS` | a Typer app or a function: `mmi NAME` |
| `mm_interleaved.models` | `pretrained.MODELS` | the folder of a checkpoint |

A plug-in is imported when its name is looked up, not before. docs/guides/plugins.md shows how to write one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar, cast

from .io import InputError, nearest_name, sentences

T = TypeVar("T")
INSTALL = (
    "What plug-ins add is known once their package is installed: pip install PACKAGE, or pip install -e . in a checkout"
)
# Errors of importing a broken module.
_BROKEN = (
    ImportError, AttributeError, SyntaxError, NameError, TypeError, ValueError, LookupError, RuntimeError, OSError,
)  # fmt: skip


class PluginError(InputError):
    """A plug-in cannot be used: which one, of which package, and why."""


class Registry(Mapping[str, T]):
    """Values by name: those of this package, registered ones, and those of plug-ins.

    Args:
        group: the group of the entry points.
        noun: the noun for a value in messages.
        kind: the class of every value; None: any callable.
        built_in: the values of this package; a string `module:attribute` is imported when it is looked up.
    """

    def __init__(
        self, group: str, noun: str, kind: type | None = None, built_in: Mapping[str, T | str] | None = None
    ) -> None:
        self.group, self.noun, self.kind = group, noun, kind
        self._built_in = dict(built_in or {})
        self._values: dict[str, T] = {}  # values that were looked up or registered

    @cached_property
    def _plugins(self) -> dict[str, EntryPoint]:
        """The entry points of plug-ins, by name.

        Raises:
            PluginError: two of them have the same name, or one has a name of this package.
        """
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            if point.name in found or point.name in self._built_in or point.name in self._values:
                other = _package(found[point.name]) if point.name in found else "mm_interleaved itself"
                raise PluginError(f"package {_package(point)} adds a {self.noun} '{point.name}', which there is "
                                  f"already, of {other}; uninstall one of them or rename it")  # fmt: skip
            found[point.name] = point
        return found

    def __getitem__(self, name: str) -> T:
        """The value of a name.

        Raises:
            KeyError: the name is unknown.
            PluginError: the plug-in that adds it cannot be imported, or adds something else.
        """
        if name not in self._values:
            if name in self._built_in:
                own = self._built_in[name]
                value = EntryPoint(name, own, self.group).load() if isinstance(own, str) else own
            elif name in self._plugins:
                value = self._load(self._plugins[name])
            else:
                raise KeyError(name)
            self._values[name] = cast(T, value)
        return self._values[name]

    def _load(self, point: EntryPoint) -> object:
        where = f"{self.describe(point.name)} ({point.value})"
        try:
            value = point.load()
        except _BROKEN as error:
            raise PluginError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
        if not (callable(value) if self.kind is None else isinstance(value, self.kind)):
            wanted = "callable" if self.kind is None else f"of type {self.kind.__name__}"
            raise PluginError(f"{where} is of type {type(value).__name__} and must be {wanted}")
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._values or name in self._plugins

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._built_in, *self._plugins, *self._values)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def register(self, name: str, value: T) -> None:
        """Add a value in this process, without a package.

        Raises:
            PluginError: the name is taken.
        """
        if name in self:
            raise PluginError(f"there is a {self.noun} '{name}' already; choose another name")
        self._values[name] = value

    def unknown(self, name: str, others: Iterable[str] = ()) -> InputError:
        """The error about an unknown name: the nearest name or all names, and how to install more.

        Args:
            name: the unknown name.
            others: other accepted names.
        """
        fix = sentences(nearest_name(name, [*others, *self]), INSTALL)
        return InputError(f"unknown {self.noun} '{name}'", fix=fix)

    def describe(self, name: str) -> str:
        """The noun and the name of a value; for a plug-in's value also its package."""
        point = self._plugins.get(name)
        return f"the {self.noun} '{name}'" + (f" of package {_package(point)}" if point is not None else "")

    def plugin(self, name: str) -> EntryPoint | None:
        """The entry point that adds a name, not imported; None: no plug-in adds it."""
        return self._plugins.get(name)


def _package(point: EntryPoint) -> str:
    return f"'{point.dist.name}'" if point.dist is not None else "(unknown)"
