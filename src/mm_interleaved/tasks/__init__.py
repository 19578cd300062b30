"""Tasks: official files of benchmarks become documents with references, a prompt, settings and names of metrics.

    task = make_task(TaskConfig("vqav2", root="datasets"))
    for sample in task.samples():
        sample.document, sample.reference

A new task is one small file; docs/reference/tasks.md shows one.
"""

from __future__ import annotations

import difflib

from . import ade20k, captions, grounding, instructions, stories, text_to_image, visdial, vqa
from .base import Item, Sample, Task, TaskConfig, TaskType, each, given, render
from .files import ImageFolder, Source, TaskError

FAMILIES = (captions, vqa, visdial, grounding, text_to_image, ade20k, stories, instructions)
TASKS: dict[str, TaskType] = {task.name: task for family in FAMILIES for task in family.TASKS}


def make_task(config: TaskConfig) -> Task:
    """The task of a configuration.

    Raises:
        TaskError: there is no such task, or a setting is not possible.
    """
    if config.task not in TASKS:
        close = difflib.get_close_matches(config.task, TASKS, n=1)
        fix = f"Did you mean '{close[0]}'?" if close else f"Tasks are {', '.join(TASKS)}"
        raise TaskError(f"there is no task '{config.task}'", fix=fix)
    return Task(TASKS[config.task], config)


def register(task: TaskType) -> TaskType:
    """Make a task known by its name.

    Raises:
        TaskError: there is one of that name already.
    """
    if task.name in TASKS:
        raise TaskError(f"there is a task '{task.name}' already", fix="Choose another name")
    TASKS[task.name] = task
    return task


__all__ = [
    "TASKS", "Item", "ImageFolder", "Sample", "Source", "Task", "TaskConfig", "TaskError", "TaskType", "each", "given",
    "make_task", "register", "render",
]  # fmt: skip
