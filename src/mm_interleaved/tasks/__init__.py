"""Tasks: official files of benchmarks become documents with references, a prompt, settings and names of metrics.

    task = make_task(TaskConfig("vqav2", root="datasets"))
    for sample in task.samples():
        sample.document, sample.reference

A new task is one small file; docs/reference/tasks.md shows one.
"""

from __future__ import annotations

from ..io import InputError
from ..plugins import Registry
from . import ade20k, captions, grounding, instructions, stories, text_to_image, visdial, vqa
from .base import Item, Sample, Task, TaskConfig, TaskType, each, given, render
from .files import ImageFolder, Source

FAMILIES = (captions, vqa, visdial, grounding, text_to_image, ade20k, stories, instructions)
TASKS: Registry[TaskType] = Registry(
    "mm_interleaved.tasks", "task", TaskType, {task.name: task for family in FAMILIES for task in family.TASKS}
)


def make_task(config: TaskConfig) -> Task:
    """The task of a configuration.

    Raises:
        InputError: there is no such task, or a setting is not possible.
        PluginError: the plug-in that adds the task cannot be used.
    """
    if config.task not in TASKS:
        raise InputError(TASKS.unknown(config.task))
    return Task(TASKS[config.task], config)


__all__ = [
    "TASKS", "Item", "ImageFolder", "Sample", "Source", "Task", "TaskConfig", "TaskType", "each", "given",
    "make_task", "render",
]  # fmt: skip
