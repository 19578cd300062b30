"""Benchmark tasks: each reads official files as documents with references, and has a prompt, settings and metrics.

    task = make_task(TaskConfig("vqav2", root="datasets"))
    for sample in task.samples():
        sample.document, sample.reference

docs/reference/tasks.md shows how to add a task in one small file.
"""

from __future__ import annotations

from ..plugins import Registry
from . import ade20k, captions, grounding, instructions, regions, stories, text_questions, text_to_image, visdial, vqa
from .base import Item, Sample, Task, TaskConfig, TaskType, each, given, render
from .files import ImageFolder, Source

FAMILIES = (
    captions, vqa, text_questions, visdial, grounding, regions, text_to_image, ade20k, stories, instructions,
)  # fmt: skip
TASKS: Registry[TaskType] = Registry(
    "mm_interleaved.tasks", "task", TaskType, {task.name: task for family in FAMILIES for task in family.TASKS}
)


def make_task(config: TaskConfig) -> Task:
    """The task of a configuration.

    Raises:
        InputError: a setting is invalid.
        PluginError: the plug-in that adds the task cannot be used.
    """
    return Task(TASKS[config.task], config)


__all__ = [
    "TASKS", "Item", "ImageFolder", "Sample", "Source", "Task", "TaskConfig", "TaskType", "each", "given",
    "make_task", "render",
]  # fmt: skip
