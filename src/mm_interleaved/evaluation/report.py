"""The results as a table in Markdown, with the values that the paper reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .reported import PAPER
from .scoring import TaskResult

HEAD = ("task", "phase", "metric", "value", "95% interval", "samples", "paper, pre-trained", "paper, fine-tuned")
NOTE = """\
The columns of the paper are reported values (arXiv 2401.10208), none measured here; those with ~ were noted from
memory. They are of the paper's models on the whole official sets. Intervals are bootstrap intervals over the samples.
"""
OTHER = "These tasks have the files of {origin}, so their figures say nothing about the official sets: {names}.\n"


def markdown(tasks: Mapping[str, TaskResult], model: Mapping[str, Any]) -> str:
    """`results.md`: the table, then the omitted values with reasons."""
    weights = f"weights {model['weights'][:12]}" + ("" if model["trained"] else ", untrained")
    lines = [f"# {model['name'] or 'model'} ({weights})", "", *_table(tasks), "", NOTE]
    for origin in dict.fromkeys(task.origin for task in tasks.values() if task.origin):
        names = [name for name, task in tasks.items() if task.origin == origin]
        lines.append(OTHER.format(origin=origin, names=", ".join(names)))
    if left := list(_left_out(tasks)):
        lines += ["## Not measured", "", *(f"- {line}" for line in left), ""]
    if notes := [f"- {name}: {note}" for name, task in tasks.items() for note in task.notes]:
        lines += ["## Notes", "", *notes, ""]
    return "\n".join(lines)


def _table(tasks: Mapping[str, TaskResult]) -> list[str]:
    rows = [HEAD, tuple("---" if i < 3 else "---:" for i in range(len(HEAD)))]
    for name, task in tasks.items():
        for metric, value, interval in shown_values(task):
            rows.append((_cell(name), task.phase, metric, f"{value:.2f}", interval, f"{task.evaluated:,}",
                         *_beside(task, metric)))  # fmt: skip
        if not any(m["values"] for m in task.metrics.values()):
            why = "failed" if task.failed else "-"
            rows.append((_cell(name), task.phase, why, "-", "-", f"{task.evaluated:,}", *_beside(task, None)))
    return ["| " + " | ".join(row) + " |" for row in rows]


def shown_values(task: TaskResult) -> list[tuple[str, float, str]]:
    """(metric, value, interval) of the main values of a task. Means by type of question are only in the JSON."""
    found = []
    for result in task.metrics.values():
        for name, value in result["values"].items():
            if "/" not in name:
                low_high = result.get("intervals", {}).get(name)
                interval = "-" if low_high is None else f"{low_high[0]:.2f} to {low_high[1]:.2f}"
                found.append((name, value, interval))
    return found


def _beside(task: TaskResult, metric: str | None) -> Sequence[str]:
    """The paper's two values if they are of this metric; None: any metric, for a task without values."""
    name, *values = PAPER.get((task.task, task.phase), ("", "-", "-"))
    if metric is None:
        return [value if value == "-" else f"{value} ({name})" for value in values]
    return values if metric == name else ("-", "-")


def _left_out(tasks: Mapping[str, TaskResult]) -> list[str]:
    lines = [f"{name}: {why}" for name, why in problems(tasks).items()]
    for name, task in tasks.items():
        if task.unreadable and not task.failed:
            first, why = next(iter(task.unreadable.items()))
            count = task.samples - task.evaluated
            lines.append(f"{name}: {count} of {task.samples:,} samples are unreadable, the first is {first}: {why}")
    return lines + skipped(tasks)


def problems(tasks: Mapping[str, TaskResult]) -> dict[str, str]:
    """Errors of failed tasks and metrics, by name."""
    found = {name: task.failed for name, task in tasks.items() if task.failed}
    for name, task in tasks.items():
        found |= {f"{name}, {m}": result["failed"] for m, result in task.metrics.items() if "failed" in result}
    return found


def skipped(tasks: Mapping[str, TaskResult]) -> list[str]:
    """One line for each reason why metrics were skipped, with its tasks."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for name, task in tasks.items():
        for metric, result in task.metrics.items():
            if "skipped" in result:
                reasons.setdefault((metric, result["skipped"], result["fix"]), []).append(name)
    return [f"{metric} of {', '.join(names)} skipped: {why}. To fix it: {fix}"
            for (metric, why, fix), names in reasons.items()]  # fmt: skip


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
