"""`mmi report`: shows a training run and writes its page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .console import output


def report(run: Annotated[Path, typer.Argument(help="Folder of a run, its `output`.", metavar="RUN")]) -> None:
    """Show the losses and task values of a training run, and write its page with plots and samples."""
    from ..training.report import read_run, write_run_report

    found = read_run(run)
    last = next((e for e in reversed(found.entries) if "loss" in e), {})
    lines = [f"step {found.steps:,}, {'finished' if found.finished else 'not finished'}"]
    if "epochs" in last:
        lines.append(f"epoch {last['epochs']:.2f}")
    lines += [f"{name} {points[-1][1]:.4g}" for name, points in found.losses.items()]
    output.print(", ".join(lines), highlight=False)
    if found.tasks:
        table = Table()
        for name in ("task", "first", "last", "best step"):
            table.add_column(name)
        for name, points in found.tasks.items():
            best = str(found.best["best_step"]) if found.best.get("metric") == name else ""
            table.add_row(escape(name), *(f"{v:.2f} (step {s})" for s, v in (points[0], points[-1])), best)
        output.print(table)
    output.print(str(write_run_report(run)), highlight=False, markup=False)
