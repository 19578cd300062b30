"""`mmi download`: downloads the original release, its base components and the tasks' annotations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .console import console, output
from .errors import UsageError

if TYPE_CHECKING:
    from ..checkpoints.hub import Offer


def download(
    what: Annotated[str, typer.Argument(help="release, base, all, annotations, or the name of a repository.")],
    target: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write; default: models, or datasets for annotations."),
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Download the release's weights, its base components or the tasks' annotations.

    Shows sizes and licences first, and resumes an interrupted download.
    """
    from ..checkpoints.hub import SETS, Component, ask, fetch

    if what in SETS:
        components = SETS[what]
    elif what.count("/") == 1:
        components = [Component(what.split("/")[1], what, ("*",), "as asked")]
    else:
        raise UsageError(f"'{what}' is neither {', '.join(SETS)} nor a repository (owner/name)")
    target = target or Path("datasets" if what == "annotations" else "models")
    with console.status("asking the hub"):
        offers = [ask(component, revision) for component in components]
    output.print(_table(offers))
    if not yes and not typer.confirm(f"Fetch {_size(sum(o.size for o in offers))} into {target}?"):
        raise typer.Exit(1)
    for offer in offers:
        output.print(f"{offer.component.name or what}: {fetch(offer, target)}")


def _table(offers: list[Offer]) -> Table:
    table = Table()
    for name in ("what", "for", "repository", "licence", "files", "size"):
        table.add_column(name)
    for offer in offers:
        part = offer.component
        table.add_row(
            part.name or "annotations",
            part.purpose,
            part.repository,
            offer.licence,
            str(len(offer.files)),
            _size(offer.size),
        )
    return table


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
