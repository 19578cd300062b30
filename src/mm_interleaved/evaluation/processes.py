"""What several processes agree on: one does it and tells the others, or each does it and all learn of a failure."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .config import EvaluationError

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # a process may be done long before the slowest


def check_launch() -> None:
    """Refuse to be one of several tasks of `srun` that do not know of each other: each would do the whole work.

    Raises:
        EvaluationError: Slurm started several tasks, and none of them is a process of torchrun.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "RANK" not in os.environ:
        raise EvaluationError(
            f"srun started {tasks} tasks, but not as processes of one run: each would do the whole work in one folder",
            "", "Start one task for each node, with torchrun in it: srun --ntasks-per-node=1 torchrun ... (README.md)",
        )  # fmt: skip


def start_processes(cpu: bool = False) -> PartialState:
    """This process and those that torchrun or `accelerate launch` started beside it.

    Raises:
        EvaluationError: as `check_launch`.
    """
    check_launch()
    return PartialState(cpu=cpu, timeout=PATIENCE)


def on_main(state: PartialState, action: Callable[[], T]) -> T:
    """What `action` gives on the main process, on all of them.

    Raises:
        EvaluationError: it raised a `ValueError`; on all processes.
    """
    if state.num_processes == 1:
        return action()
    outcome: list[object] = [None, ""]
    if state.is_main_process:
        try:
            outcome[0] = action()
        except ValueError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1]:
        raise EvaluationError(str(outcome[1]))
    return cast(T, outcome[0])


def on_all(state: PartialState, action: Callable[[], T]) -> T:
    """What `action` gives on this process, once it went well on all of them.

    Raises:
        EvaluationError: it raised a `ValueError` on one of them; on all processes.
    """
    result, problem = None, ""
    try:
        result = action()
    except ValueError as error:
        problem = str(error)
    problems = gather_object([problem]) if state.num_processes > 1 else [problem]
    if found := next(filter(None, problems), ""):
        raise EvaluationError(found)
    return cast(T, result)
