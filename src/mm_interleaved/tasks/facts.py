"""What is known about the samples of a task beside their references, when a plug-in recognises its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..plugins import Registry
from .base import Task


@dataclass(frozen=True)
class Facts:
    """What is known about the samples of a task.

    Attributes:
        origin: whose files they are, for reports, such as "the toy world"; they are not the official ones.
        metrics: names of the metrics that compare with the facts, computed beside those of the task.
        data: the facts, for these metrics.
    """

    origin: str
    metrics: tuple[str, ...] = ()
    data: Any = None


FindFacts = Callable[[Task], Facts | None]  # None: the files are not those that it knows
FACTS: Registry[FindFacts] = Registry("mm_interleaved.tasks.facts", "finder of facts")


def find_facts(task: Task) -> Facts | None:
    """Return what the first plug-in that recognises the files of a task knows about it; None: none does."""
    return next((facts for find in FACTS.values() if (facts := find(task)) is not None), None)
