"""Commands of plug-ins. The help lists them without importing them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import typer
from typer.core import TyperGroup

from ..plugins import PluginError, Registry

COMMANDS: Registry[Callable[..., Any]] = Registry("mm_interleaved.commands", "command")


class CommandGroup(TyperGroup):
    """The commands of an app, then those of plug-ins."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return all names.

        Raises:
            PluginError: a plug-in adds a command that exists already.
        """
        own = super().list_commands(ctx)
        if taken := [name for name in own if name in COMMANDS]:
            raise PluginError(f"a plug-in adds a command '{taken[0]}', which mmi has already; uninstall it")
        return [*own, *COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; for a plug-in, a stub with its description."""
        own = super().get_command(ctx, cmd_name)
        point = COMMANDS.plugin(cmd_name) if own is None else None
        return own if point is None else _description(point)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the called command, which is imported, and the remaining arguments.

        Raises:
            click's UsageError: there is no such command.
        """
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(str(COMMANDS.unknown(args[0], self.commands)))
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and name not in self.commands:
            command = _command(name, COMMANDS[name])
        return name, command, rest


def _command(name: str, value: Callable[..., Any]) -> Any:
    app = value
    if not isinstance(app, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command()(value)
    command = typer.main.get_command(app)
    command.name = name
    return command


def _description(point: EntryPoint) -> Any:
    package = point.dist.name if point.dist is not None else "unknown"

    def described() -> None: ...

    described.__doc__ = f"Plug-in `{point.module.partition('.')[0]}` of the package {package}."
    return _command(point.name, described)
