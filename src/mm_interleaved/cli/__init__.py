"""`mmi`, the command line. Each subcommand is a module, which imports PyTorch only when it runs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..io import InputError, UserError, check_text
from .bench import bench
from .chat import chat
from .console import console
from .convert import assemble, convert
from .data import data
from .download import download
from .errors import UsageError
from .evaluate import evaluate_command
from .finetune import finetune
from .generate import generate
from .info import info
from .inspect import inspect_command
from .launch import launch
from .plan import plan
from .plugins import CommandGroup
from .run_report import report
from .serve import serve
from .train import train

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Read and write documents in which text and images alternate.",
)
app.command()(generate)
app.command()(info)
app.command()(bench)
app.command()(convert)
app.command()(download)
app.command()(assemble)
app.command()(train)
app.command()(plan)
app.command()(finetune)
app.command()(report)
app.command()(serve)
app.command()(chat)
app.command("inspect")(inspect_command)
app.command("evaluate")(evaluate_command)
app.add_typer(data, name="data")
app.add_typer(launch, name="launch")


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"mm-interleaved {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line. Errors that the user can correct are printed as one message, with exit status 1."""
    _quieten_libraries()
    try:
        _check_names(sys.argv[1:] if arguments is None else arguments)
        return app(arguments)
    except UserError as error:
        console.print(f"[bold red]error:[/] {_escaped(error)}", highlight=False)
        sys.exit(error.status)


def _quieten_libraries() -> None:
    """Limit the messages of libraries to errors: their warnings do not help a user of the command line."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _check_names(arguments: Sequence[str]) -> None:
    """Refuse names that are not UTF-8 before work begins, because no results file could hold them.

    Raises:
        UsageError: an argument or the working directory has such a name.
    """
    for name in (*arguments, os.getcwd()):
        try:
            check_text(name)
        except InputError:
            raise UsageError(f"the name '{os.fsencode(name).decode(errors='replace')}' is not UTF-8; rename it, or "
                             "make a link to it with another name") from None  # fmt: skip


def _escaped(error: Exception) -> str:
    return str(error).replace("[", r"\[")
