"""Bars of an evaluation's main values, with their intervals; several evaluations side by side.

python benchmarks/plot_tasks.py runs/small/evaluation/results.json --output tasks.png
python benchmarks/plot_tasks.py runs/a/results.json runs/b/results.json --labels "with MMFS" without --output tasks.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def main_values(results: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """(value, lower, upper) by task and metric, of the values that have an interval."""
    found = {}
    for task, result in results["tasks"].items():
        for metric in result["metrics"].values():
            for name, (low, high) in metric.get("intervals", {}).items():
                found[f"{task}\n{name}"] = (metric["values"][name], low, high)
    return found


def plot(sets: list[dict[str, tuple[float, float, float]]], labels: list[str], output: Path) -> None:
    """Draw and write the figure."""
    names = list(dict.fromkeys(name for values in sets for name in values))
    columns = 4
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 1.7 * rows), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        for place, values in enumerate(sets):
            if name in values:
                value, low, high = values[name]
                ends = np.clip([[value - low], [high - value]], 0, None)
                axis.barh(place, value, xerr=ends, color=f"C{place}", height=0.7, capsize=3, label=labels[place])
                axis.text(value, place, f" {value:.1f}", va="bottom", fontsize=8)
        axis.set_title(name, fontsize=8)
        axis.set_yticks(range(len(sets)), labels if len(sets) > 1 else [""] * len(sets), fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.2 * max([values[name][2] for values in sets if name in values] + [0]) or 1)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(output, dpi=130)


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of evaluations")
    parser.add_argument("--labels", nargs="+", help="what they are called; default: the models' names")
    parser.add_argument("--output", type=Path, required=True, help="PNG, SVG or PDF file")
    options = parser.parse_args()
    found = [json.loads(path.read_text()) for path in options.results]
    labels = options.labels or [str(results["model"]["name"]) for results in found]
    if len(labels) != len(found):
        parser.error(f"{len(found)} results need as many labels, not {len(labels)}")
    plot([main_values(results) for results in found], labels, options.output)


if __name__ == "__main__":
    main()
