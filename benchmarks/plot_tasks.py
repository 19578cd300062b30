"""An evaluation's main values with their intervals; several evaluations side by side.

python benchmarks/plot_tasks.py runs/small/evaluation/results.json --output tasks.png
python benchmarks/plot_tasks.py runs/a/results.json runs/b/results.json --labels "with MMFS" without --output tasks.png
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLUMNS = 3
MAIN = ("found_kind_color", "relations_right", "kept", "perfect")


Interval = tuple[float, float, float]  # value, lower and upper bound


def main_values(results: dict[str, Any]) -> dict[str, dict[str, Interval]]:
    """By metric and task, the first value with an interval of each metric; of scenes' scores those of `MAIN`."""
    found: dict[str, dict[str, Interval]] = defaultdict(dict)
    for task, result in results["tasks"].items():
        for kind, metric in result["metrics"].items():
            intervals = metric.get("intervals", {})
            for name in [n for n in MAIN if n in intervals] if kind == "scene_images" else list(intervals)[:1]:
                found[name][task] = (metric["values"][name], *intervals[name])
    return found


def plot(sets: list[dict[str, dict[str, Interval]]], labels: list[str], output: Path) -> None:
    """Draw and write the figure: a panel a metric, a line a task, a point and its interval for each evaluation."""
    metrics = list(dict.fromkeys(metric for values in sets for metric in values))
    tasks = {m: list(dict.fromkeys(t for values in sets for t in values.get(m, ()))) for m in metrics}
    grid = [metrics[i : i + COLUMNS] for i in range(0, len(metrics), COLUMNS)]
    heights = [max(len(tasks[m]) for m in row) + 1.5 for row in grid]
    figure, axes = plt.subplots(
        len(grid), COLUMNS, figsize=(4.2 * COLUMNS, 0.26 * sum(heights)), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(metrics) :]:
        axis.axis("off")
    for axis, metric in zip(axes.flat, metrics, strict=False):
        _panel(axis, metric, tasks[metric], [values.get(metric, {}) for values in sets])
    if len(sets) > 1:
        marks = [plt.Line2D([], [], color=f"C{i}", marker="o", label=label) for i, label in enumerate(labels)]
        figure.legend(handles=marks, loc="outside lower center", ncols=len(sets))
    figure.savefig(output, dpi=130)


def _panel(axis: Axes, metric: str, tasks: list[str], sets: list[dict[str, Interval]]) -> None:
    for number, values in enumerate(sets):
        shift = (number - (len(sets) - 1) / 2) * 0.25
        for place, task in enumerate(tasks):
            if task in values:
                value, low, high = values[task]
                axis.plot([low, high], [place + shift] * 2, color=f"C{number}", linewidth=3, alpha=0.4)
                axis.plot(value, place + shift, "o", color=f"C{number}", markersize=5)
                axis.annotate(f"{value:.0f}", (max(value, high), place + shift), (4, 0), textcoords="offset points",
                              va="center", fontsize=7)  # fmt: skip
    axis.set_title(metric, fontsize=9, loc="left")
    axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axis.set_ylim(len(tasks) - 0.4, -0.6)
    top = max([values[t][2] for values in sets for t in tasks if t in values] + [0])
    axis.set_xlim(0, 106 if top <= 100 else 1.12 * top)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


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
