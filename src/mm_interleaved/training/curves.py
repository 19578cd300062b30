"""Curves of a run's log as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PANELS = ("loss", "loss_txt", "loss_img", "grad_norm", "lr", "tokens_per_second", "images_per_second", "mfu")
OTHER_PANELS = ("loss", "loss_l1", "loss_edges", "loss_adversarial", "psnr", "ssim", "grad_norm", "images_per_second")


def read_log(run: Path) -> list[dict[str, Any]]:
    """The entries of a run's `log.jsonl`.

    Raises:
        ValueError: there is no log, or a line of it is damaged.
    """
    path = run / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"'{run}' is not the folder of a run: it has no log.jsonl")
    entries = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entries.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number}: not JSON") from None
    return entries


def plot(run: Path, output: Path) -> None:
    """Write the curves of a run: each measure a panel, evaluation beside training.

    Raises:
        ValueError: the run has logged nothing.
    """
    entries = read_log(run)
    names = {name for entry in entries for name in entry}
    panels = PANELS if "loss_txt" in names or "loss_img" in names else OTHER_PANELS
    panels = [p for p in panels if p in names or f"eval_{p}" in names or (p == "lr" and "learning_rate" in names)]
    if not panels:
        raise ValueError(f"'{run}' has logged nothing yet")
    figure = Figure(figsize=(16, 3.4 * -(-len(panels) // 4)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 4), 4, squeeze=False).flat
    for panel, axis in zip(panels, axes, strict=False):  # in this order no axis is lost
        wanted = [n for n in sorted(names) if n in (panel, f"eval_{panel}") or (panel == "lr" and n.startswith("lr/"))]
        for name in wanted:
            points = [(e["step"], e[name]) for e in entries if name in e]
            axis.plot(
                *zip(*points, strict=True), label=name.removeprefix("lr/"), marker="." if len(points) < 30 else ""
            )
        axis.set(title=panel, xlabel="step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if len(wanted) > 1:
            axis.legend(fontsize="small")
    for axis in list(axes):
        axis.set_axis_off()
    figure.savefig(output, dpi=110)
