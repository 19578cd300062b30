"""Curves of runs' logs as an image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANELS = ("loss", "loss_txt", "loss_img", "grad_norm", "lr", "tokens_per_second", "images_per_second", "mfu")
OTHER_PANELS = ("loss", "loss_l1", "loss_edges", "loss_adversarial", "psnr", "ssim", "grad_norm", "images_per_second")
_COLUMNS = 4


def read_log(run: Path) -> list[dict[str, Any]]:
    """The entries of a log: a `.jsonl` file, or the one in the folder of a run.

    Raises:
        ValueError: there is no log, or a line of it is damaged.
    """
    path = run if run.suffix == ".jsonl" else run / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"'{run}' is neither a log nor the folder of a run: there is no {path}")
    entries = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entries.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number}: not JSON") from None
    return entries


def plot(runs: Sequence[Path], output: Path) -> None:
    """Write the curves of runs one below the other: each measure a panel, evaluation beside training.

    Raises:
        ValueError: a run has logged nothing.
    """
    logs = [(run.stem if run.suffix == ".jsonl" else run.name, read_log(run)) for run in runs]
    panels = [_panels(name, entries) for name, entries in logs]
    rows = sum(-(-len(p) // _COLUMNS) for p in panels)
    figure = Figure(figsize=(16, 3.4 * rows), layout="constrained")
    axes = iter(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for (name, entries), chosen in zip(logs, panels, strict=True):
        for panel in chosen:
            _draw(next(axes), panel, entries, f"{name}: {panel}" if len(logs) > 1 else panel)
        for _ in range(-len(chosen) % _COLUMNS):
            next(axes).set_axis_off()
    figure.savefig(output, dpi=110)


def _panels(name: str, entries: list[dict[str, Any]]) -> list[str]:
    names = {name for entry in entries for name in entry}
    panels = PANELS if "loss_txt" in names or "loss_img" in names else OTHER_PANELS
    found = [p for p in panels if p in names or f"eval_{p}" in names or (p == "lr" and "learning_rate" in names)]
    if not found:
        raise ValueError(f"'{name}' has logged nothing yet")
    return found


def _draw(axis: Axes, panel: str, entries: list[dict[str, Any]], title: str) -> None:
    names = {name for entry in entries for name in entry}
    wanted = [n for n in sorted(names) if n in (panel, f"eval_{panel}") or (panel == "lr" and n.startswith("lr/"))]
    for name in wanted:
        points = [(e["step"], e[name]) for e in entries if name in e]
        axis.plot(*zip(*points, strict=True), label=name.removeprefix("lr/"), marker="." if len(points) < 30 else "")
    axis.set(title=title, xlabel="step")
    locator: Any = axis.xaxis.get_major_locator()
    locator.set_params(integer=True)
    axis.grid(alpha=0.3)
    if len(wanted) > 1:
        axis.legend(fontsize="small")
