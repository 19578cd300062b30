"""Facts about the samples of a task besides their references, from a plug-in that recognises the files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..plugins import Registry
from .base import Task


@dataclass(frozen=True)
class Facts:
    """Facts about the samples of a task.

    Attributes:
        origin: the origin of the files, for reports, such as "the toy world"; they are not the official ones.
        metrics: names of the metrics that use the facts, computed in addition to those of the task.
        data: the facts, for these metrics.
    """

    origin: str
    metrics: tuple[str, ...] = ()
    data: Any = None


FindFacts = Callable[[Task], Facts | None]  # None: it does not recognise the files
FACTS: Registry[FindFacts] = Registry("mm_interleaved.tasks.facts", "finder of facts")


def find_facts(task: Task) -> Facts | None:
    """Return the facts of the first plug-in that recognises the files of a task; None: no plug-in does."""
    return next((facts for find in FACTS.values() if (facts := find(task)) is not None), None)
