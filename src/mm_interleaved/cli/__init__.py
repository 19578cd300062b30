"""`mmi`, the command line."""

from __future__ import annotations

import sys
from typing import Any

import typer
from transformers.utils import logging as transformers_logging

from ..checkpoints.checkpoint import CheckpointError
from ..data import DataError
from ..document import DocumentError
from ..evaluation import EvaluationError
from ..validation import ConfigError
from .bench import bench
from .console import console
from .convert import assemble, convert
from .data import data
from .download import download
from .evaluate import evaluate_command
from .generate import UsageError, generate
from .info import info
from .toyworld import toyworld
from .train import train, train_language, train_vae, train_vision

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
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
app.command()(train_vae)
app.command()(train_vision)
app.command()(train_language)
app.command("evaluate")(evaluate_command)
app.add_typer(data, name="data")
app.add_typer(toyworld, name="toyworld")


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; errors that a user can mend become one message and exit status 1."""
    transformers_logging.set_verbosity_error()  # our errors say it all
    transformers_logging.disable_progress_bar()
    try:
        return app(arguments)
    except (ConfigError, DataError, DocumentError, CheckpointError, EvaluationError, UsageError) as error:
        console.print(f"[bold red]error:[/] {_escaped(error)}", highlight=False)
        sys.exit(1)


def _escaped(error: Exception) -> str:
    return str(error).replace("[", r"\[")
