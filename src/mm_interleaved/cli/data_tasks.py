"""`mmi data check` and `mmi data prepare` for the files of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn

from .console import console, output
from .errors import UsageError

if TYPE_CHECKING:
    from ..tasks import TaskConfig
    from ..tasks.check import TaskCheck
    from ..tasks.facts import Facts


ROOT = "datasets"  # the default folder of the documented tree


def check_tasks(tasks: Sequence[TaskConfig]) -> None:
    """Check the files of tasks and print the findings.

    Raises:
        UsageError: some files are missing or damaged.
    """
    from ..evaluation.config import task_name
    from ..tasks import make_task
    from ..tasks.check import check_task
    from ..tasks.facts import find_facts

    made = [make_task(config) for config in tasks]
    bad = []
    for task in made:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed} samples"))
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            shown = progress.add_task(task.name, total=None)
            found = check_task(task, lambda shown=shown, progress=progress: progress.advance(shown))
        _print(task_name(task.config), found, find_facts(task) if found.samples else None)
        bad += [] if found.good else [task.name]
    if bad:
        raise UsageError(f"the files of these tasks are not complete: {', '.join(bad)}")


def _print(name: str, found: TaskCheck, facts: Facts | None) -> None:
    counts = [f"{found.samples:,} samples", f"{found.images:,} images"]
    counts += [f"{found.frames:,} frames"] if found.frames else []
    counts += [f"{found.missing:,} samples cannot be used"] if found.missing else []
    counts += [f"{found.unreadable:,} images cannot be read"] if found.unreadable else []
    mark = "[green]good[/]" if found.good else "[red]not complete[/]"
    output.print(f"[bold]{name}[/]: {mark}: {', '.join(counts)}", highlight=False)
    if facts is not None:
        output.print(f"  these are files of {facts.origin}", highlight=False, markup=False)
    elif found.expected is not None and found.records not in (0, found.expected):
        output.print(f"  [yellow]the official set has {found.expected:,} records, not {found.records:,}[/]",
                     highlight=False)  # fmt: skip
    for problem in found.problems:
        output.print(f"  {problem}", highlight=False, markup=False)
    if not found.good and not any(found.fix in problem for problem in found.problems):
        output.print(f"  {found.fix}", highlight=False, markup=False)
    if found.command:
        output.print(f"  then convert the official files: {found.command}", highlight=False, markup=False,
                     soft_wrap=True)  # fmt: skip


def prepare(
    task: Annotated[
        str,
        typer.Argument(
            help="flickr30k, image2paragraph, textvqa, refcoco, refcoco+, refcocog, ade20k, vist, vist_text, "
            "flintstones; others need no conversion."
        ),
    ],
    source: Annotated[Path, typer.Option(help="Folder of the official files.")],
    root: Annotated[Path, typer.Option(help="Folder of the tree in docs/data_formats.md.")] = Path(ROOT),
    phase: Annotated[str, typer.Option(help="Part of the data set; default: the task's first.")] = "",
) -> None:
    """Convert official files to the format that a task reads."""
    from ..tasks import TASKS
    from ..tasks.prepare import prepare as convert

    if task not in TASKS:
        raise TASKS.unknown(task)
    with console.status(f"converting {task}"):
        lines = convert(TASKS[task], source, root, phase)
    for line in lines:
        output.print(line, highlight=False, markup=False)
    output.print(f"to check them: mmi data check {task} root={root}" + (f" phase={phase}" if phase else ""),
                 highlight=False, markup=False)  # fmt: skip


def neighbours(
    task: Annotated[str, typer.Argument(help="A task with few-shot examples, such as vqav2 or coco_karpathy.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, its settings: root=DIR phase=val shot_phase=train.")
    ] = None,
    clip: Annotated[Path, typer.Option(help="Folder of a CLIP model.")] = Path("models/clip-vit-large-patch14"),
    count: Annotated[int, typer.Option(help="Number of examples of each sample.", min=1)] = 16,
    output_file: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("neighbours.json"),
    device: Annotated[str, typer.Option(help="Where CLIP runs: cpu or cuda.")] = "cpu",
) -> None:
    """List the most similar few-shot examples of each sample by CLIP, for the setting `neighbours` (RICES)."""
    from ..configuration import make_config
    from ..io import write_json
    from ..metrics.clip import CLIP
    from ..metrics.result import MissingRequirement
    from ..tasks import TaskConfig, make_task
    from ..tasks.neighbours import find_neighbours

    made = make_task(make_config({"task": task, "root": ROOT}, TaskConfig, overrides or [], f"task '{task}'"))
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed} images"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        shown = progress.add_task(task, total=None)
        try:
            found = find_neighbours(made, CLIP(clip, device), count,
                                    lambda words: progress.update(shown, advance=1, description=words))  # fmt: skip
        except MissingRequirement as error:
            raise UsageError(error.reason, "--clip", error.fix) from None
    write_json(output_file, found, indent=None)
    output.print(f"{output_file}: {count} examples for each of {len(found):,} samples. To use it: "
                 f"neighbours: {output_file}",
                 highlight=False, markup=False, soft_wrap=True)  # fmt: skip
