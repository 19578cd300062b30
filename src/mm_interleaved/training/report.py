"""The page of a run: its losses, task values and samples over time. Made of files in the run's folder only.

report.html    losses, values of tasks by step, samples by step
loss.png       the losses and task values as curves
"""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from ..io import InputError, parse_json, read_json, write_atomic
from .checkpoints import BEST, list_checkpoints

LOG, PLOT, PAGE, SAMPLES, FINAL_NOTE = "log.jsonl", "loss.png", "report.html", "samples", "final/trained.json"
LOSSES = ("loss", "eval_loss")  # prefixes of what is plotted as a loss
SHOWN_STEPS = 6  # of samples, on the page
TASK = "eval_"  # prefix of the values of tasks, which have a '/' in their names


@dataclass
class RunRecord:
    """What the folder of a run says.

    Attributes:
        entries: the log, by step.
        losses, tasks: (step, value) of every loss and of every main value of a task.
        samples: for each step with samples its documents: the segments that are given, and those that are generated.
        best: the metric of `early_stopping` with its best value and step, or {}.
        steps: steps of the run so far.
        finished: whether there is a final model.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    tasks: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    finished: bool = False


def read_run(folder: Path) -> RunRecord:
    """Read the folder of a run.

    Raises:
        InputError: it is no folder of a run.
    """
    if not (folder / LOG).is_file() and not list_checkpoints(folder):
        raise InputError("is no folder of a run: it has no log.jsonl and no checkpoint", str(folder),
                         "Name the 'output' of a run")  # fmt: skip
    run = RunRecord(finished=(folder / FINAL_NOTE).is_file())
    if own := list_checkpoints(folder):  # a short run may end before its first line in the log
        run.steps = int(own[-1].name.rpartition("-")[2])
    for line in (folder / LOG).read_text().splitlines() if (folder / LOG).is_file() else []:
        try:
            entry = parse_json(line)
        except InputError:  # an incomplete last line of a killed process
            continue
        run.entries.append(entry)
        run.steps = max(run.steps, int(entry["step"]))
        for name, value in entry.items():
            if name.startswith(LOSSES) and "/" not in name:
                run.losses.setdefault(name, []).append((entry["step"], value))
            elif name.startswith(TASK) and "/" in name:
                run.tasks.setdefault(name.removeprefix(TASK), []).append((entry["step"], value))
    run.samples = [_sample(path) for path in sorted((folder / SAMPLES).glob("*.json"))]
    run.best = _best(folder)
    return run


def _sample(path: Path) -> dict[str, Any]:
    """The documents of a step, with the paths of their images relative to the folder of the run."""
    documents = []
    for entry in read_json(path, list):
        parts = {
            name: [s | {"image": f"{SAMPLES}/{s['image']}"} if "image" in s else s for s in entry[name]]
            for name in ("segments", "wanted")
        }
        given, generated = ([s for s in parts["segments"] if s["generated"] == made] for made in (False, True))
        documents.append({"given": given, "generated": generated, "wanted": parts["wanted"]})
    return {"step": int(path.stem), "documents": documents}


def _few(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `SHOWN_STEPS` of the steps, the first and the last among them."""
    last = len(samples) - 1
    kept = sorted({round(i * last / (SHOWN_STEPS - 1)) for i in range(SHOWN_STEPS)}) if samples else []
    return [samples[i] for i in kept]


def _best(folder: Path) -> dict[str, Any]:
    own = list_checkpoints(folder)
    if not own:
        return {}
    states = read_json(own[-1] / "trainer_state.json", dict).get("stateful_callbacks", {})
    return states.get("EarlyStopping", {}).get("attributes", {})


def write_run_report(folder: Path) -> Path | None:
    """Write the plot and the page of a run. Returns the path of the page; None: nothing has been logged."""
    try:
        run = read_run(folder)
    except InputError:
        return None
    if run.losses or run.tasks:
        write_atomic(folder / PLOT, _plot(run))
    environment = Environment(loader=PackageLoader("mm_interleaved.training"), autoescape=True)
    steps = sorted({step for points in run.tasks.values() for step, _ in points})
    page = environment.get_template("run.html").render(
        name=folder.name,
        run=run,
        samples=_few(run.samples),
        plot=PLOT if (folder / PLOT).is_file() else None,
        steps=steps,
        tasks={name: dict(points) for name, points in run.tasks.items()},
        last=next((e for e in reversed(run.entries) if "loss" in e), {}),
        best_link=BEST if (folder / BEST).exists() else None,
    )
    write_atomic(folder / PAGE, page)
    return folder / PAGE


def _plot(run: RunRecord) -> bytes:
    from matplotlib.figure import Figure  # slow to import

    panels = [p for p in ((run.losses, "loss"), (run.tasks, "value of a task")) if p[0]]
    figure = Figure(figsize=(5.2 * len(panels), 3.6), dpi=100, layout="tight")
    for axis, (curves, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) < 40 else "")
        axis.set(xlabel="step", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
        if run.best.get("best_step") is not None and curves is run.tasks:
            axis.axvline(run.best["best_step"], color="grey", linestyle=":")
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
