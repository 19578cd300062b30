"""Describe the commands and the settings in Markdown, from the code itself: reference pages of the documentation.

    python scripts/describe_interface.py commands > commands.md
    python scripts/describe_interface.py settings > settings.md

`docs/theme/hooks.py` calls it when the site is built. The sections have headings of the second level and below.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

import annotated_types
import typer
import typer.main
from pydantic import AfterValidator
from pydantic_core import PydanticUndefined

SHELL = ("help", "install_completion", "show_completion")
NUMBERS = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any value"}


# ---- commands


def describe_commands() -> str:
    """Every command of `mmi` with its arguments and options."""
    from mm_interleaved.cli import app
    from mm_interleaved.cli.plugins import COMMANDS

    own = typer.main.get_command(app)
    plugins = {
        name: typer.main.get_command(COMMANDS[name]) for name in COMMANDS if isinstance(COMMANDS[name], typer.Typer)
    }
    commands = {**own.commands, **plugins}  # type: ignore[attr-defined]
    return "\n\n".join(part for name, command in commands.items() for part in _command(command, f"mmi {name}"))


def _command(command: Any, name: str) -> Iterator[str]:
    """The sections of a command and its subcommands, whether Typer brings click or depends on it."""
    params = [p for p in command.params if not getattr(p, "hidden", False) and p.name not in SHELL]
    subcommands = getattr(command, "commands", {})
    yield f"{'#' * min(1 + name.count(' '), 4)} {name}"
    yield _prose(command.help or "")
    positional = [_place(param) for param in params if param.param_type_name == "argument"]
    yield "\n".join(
        ["```text", " ".join([name, "[OPTIONS]", *(["COMMAND"] if subcommands else []), *positional]), "```"]
    )
    if params:
        yield "\n".join(["| argument or option | default | meaning |", "|---|---|---|", *map(_parameter, params)])
    for sub, found in subcommands.items():
        if not found.hidden:
            yield from _command(found, f"{name} {sub}")


def _place(param: Any) -> str:
    """An argument as in a usage line."""
    shown = (param.metavar or (param.name or "").upper()).strip("[]").removesuffix("...")
    shown += "..." if param.nargs == -1 else ""
    return shown if param.required else f"[{shown}]"


def _parameter(param: Any) -> str:
    if param.param_type_name == "argument":
        shown = f"`{_place(param)}`"
    else:
        value = "" if param.is_flag else f" {param.metavar or param.name.upper()}"
        shown = ", ".join(f"`{option}{value}`" for option in (*param.opts, *param.secondary_opts))
        shown += ", repeatable" if param.multiple else ""
    empty = param.default in (None, False, [], ()) or callable(param.default)
    default = "required" if param.required else "" if empty else f"`{param.default}`"
    return f"| {shown} | {default} | {_cell(getattr(param, 'help', None) or '')} |"


# ---- settings


def describe_settings() -> str:
    """Every setting of the YAML files and of `key=value` arguments: its type, default and meaning."""
    described: set[type] = set()
    return "\n\n".join(part for title, about, kinds in _files() for part in _file(title, about, kinds, described))


def _files() -> list[tuple[str, str, list[tuple[str, type]]]]:
    """(title, introduction, settings classes by heading) of each kind of file."""
    from mm_interleaved.adapters.settings import AdapterSettings
    from mm_interleaved.data.sources import SOURCES
    from mm_interleaved.evaluation.config import EvaluateConfig
    from mm_interleaved.generation.settings import GenerationSettings
    from mm_interleaved.serving.config import ServeConfig
    from mm_interleaved.training.config import TrainConfig

    options = [(f"Options of a source of type {name}", SOURCES[name].options) for name in SOURCES]
    return [
        (
            "Training", "The file of `mmi train` and `mmi finetune`, and a recipe of the package.",
            [("The run", TrainConfig), ("Adapter", AdapterSettings)],
        ),
        (
            "Sources", "`options` of an entry of `data.sources`, by its `type`.",
            [(title, kind) for title, kind in options if kind is not None and dataclasses.is_dataclass(kind)],
        ),
        ("Evaluation", "The file of `mmi evaluate`.", [("The evaluation", EvaluateConfig)]),
        (
            "Generation",
            "Arguments `key=value` of `mmi generate`, arguments of `generate_interleaved`, and `generation` of a task. "
            "The names of all three classes may be given side by side.",
            [("The document", GenerationSettings)],
        ),
        ("Serving", "The file of `mmi serve --config`, and its arguments `key=value`.", [("The server", ServeConfig)]),
    ]  # fmt: skip


def _file(title: str, about: str, kinds: list[tuple[str, type]], described: set[type]) -> Iterator[str]:
    yield f"## {title}"
    yield about
    waiting = list(kinds)
    while waiting:
        heading, kind = waiting.pop(0)
        if kind in described:
            continue
        described.add(kind)
        yield f"### {heading} {{ #{kind.__name__.lower()} }}" if heading else f"### {kind.__name__}"
        first, _, _ = (inspect.getdoc(kind) or "").partition("\nAttributes:")
        yield _prose(first)
        yield "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *_rows(kind)])
        waiting += [("", inner) for _, field in _fields(kind) for inner in _classes(field.annotation)]


def _rows(kind: type) -> Iterator[str]:
    meanings = describe_fields(kind)
    for name, field in _fields(kind):
        cells = (_type(field.annotation, field.metadata), _value(field), meanings.get(name, ""))
        yield f"| `{field.alias or name}` | {' | '.join(map(_cell, cells))} |"


def _fields(kind: type) -> list[tuple[str, Any]]:
    return list(kind.__pydantic_fields__.items())  # type: ignore[attr-defined]


def describe_fields(kind: type) -> dict[str, str]:
    """The meaning of each field: from `Attributes` of the docstrings, or else from the comment beside it or above."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if "__pydantic_fields__" in vars(owner):
            found |= _comments(owner) | _attributes(inspect.getdoc(owner) or "")
    return found


def _attributes(doc: str) -> dict[str, str]:
    """The entries of the section `Attributes`; an entry may name several fields."""
    _, _, section = doc.partition("\nAttributes:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", section.rstrip()):
        names, colon, meaning = entry.strip().partition(":")
        if colon:
            found |= dict.fromkeys(re.split(r",\s*", names), " ".join(meaning.split()))
    return found


def _comments(kind: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            _, mark, beside = lines[(node.end_lineno or node.lineno) - 1].rpartition("  # ")
            above = lines[node.lineno - 2].strip()
            if mark and not beside.startswith(("fmt:", "pyright:")):
                found[node.target.id] = beside
            elif above.startswith("# "):
                found[node.target.id] = above[2:]
    return found


def _classes(annotation: Any) -> Iterator[type]:
    """The settings classes in a type."""
    if isinstance(annotation, type) and hasattr(annotation, "__pydantic_fields__"):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _classes(inner)


def _type(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """A type in words, with its bounds."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(args[0], args[1:])
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else _type(arg, metadata) for arg in args)
    if origin is typing.Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin is list:
        return f"list of {_type(args[0])}{_bounds(metadata, 'items')}"
    if origin is dict:
        return f"mapping of {_type(args[1])}" if args[1] is not Any else "mapping"
    if origin is tuple:
        return f"{len(args)} values: {_type(args[0])}"
    if hasattr(annotation, "__pydantic_fields__"):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return NUMBERS[annotation] + _bounds(metadata, "")


def _bounds(metadata: typing.Sequence[Any], unit: str) -> str:
    """The bounds of a number or a list; those that only keep numbers in 32 or 64 bits are left out."""
    words = []
    for item in (piece for entry in metadata for piece in getattr(entry, "metadata", [entry])):
        match item:
            case annotated_types.Ge(ge=bound):
                words.append(f"at least {bound}")
            case annotated_types.Gt(gt=bound):
                words.append(f"above {bound}")
            case annotated_types.Le(le=bound):
                words.append(f"at most {bound}")
            case annotated_types.Lt(lt=bound) if bound < 2**31:
                words.append(f"below {bound}")
            case annotated_types.MinLen(min_length=bound):
                words.append(f"at least {bound} {unit}".rstrip())
            case annotated_types.MaxLen(max_length=bound):
                words.append(f"at most {bound} {unit}".rstrip())
            case AfterValidator() | annotated_types.Lt() | None:
                pass
            case _:
                raise TypeError(f"a bound that this script cannot describe: {item!r}")
    return f" ({', '.join(words)})" if words else ""


def _value(field: Any) -> str:
    default = field.default_factory() if field.default_factory is not None else field.default
    if default is PydanticUndefined:
        return "required"
    if dataclasses.is_dataclass(default):
        changed = {
            f.name: getattr(default, f.name)
            for f in dataclasses.fields(default)
            if f.default is not dataclasses.MISSING and getattr(default, f.name) != f.default
        }
        return f"its defaults{', with ' + ', '.join(f'`{n}: {v}`' for n, v in changed.items()) if changed else ''}"
    match default:
        case None:
            return "`null`"
        case bool():
            return f"`{str(default).lower()}`"
        case list() | dict() if not default:
            return "empty"
        case list() | tuple():
            return ", ".join(f"`{item}`" for item in default)
        case "":
            return "empty"
        case _:
            return f"`{default}`"


# ---- Markdown


def _cell(text: str) -> str:
    """`text` in one cell of a table."""
    return " ".join(_quoted(text).split()).replace("|", "\\|")


def _prose(text: str) -> str:
    return "\n\n".join(" ".join(_quoted(part).split()) for part in re.split(r"\n\s*\n", text.strip()))


def _quoted(text: str) -> str:
    """`text` with angle brackets as characters outside of code, where Markdown would read a tag."""
    return "".join(part if part[:1] == "`" else part.replace("<", "&lt;") for part in re.split(r"(`[^`]*`)", text))


KINDS = {"commands": describe_commands, "settings": describe_settings}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: {sys.argv[0]} {' or '.join(KINDS)}")
    print(KINDS[sys.argv[1]]())
