"""Start of processes, and functions that run on one or all of them and raise their errors on all."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..io import OutputError
from .config import EvaluationError

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # a process may finish long before the slowest


def check_launch() -> None:
    """Refuse several tasks of `srun` without torchrun: each would do the whole work.

    Raises:
        EvaluationError: Slurm started several tasks, and this one is not a process of torchrun.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "RANK" not in os.environ:
        raise EvaluationError(
            f"srun started {tasks} tasks, but not as processes of one run: each would do the whole work in one folder",
            "", "Start one task for each node, with torchrun in it: srun --ntasks-per-node=1 torchrun ... (README.md)",
        )  # fmt: skip


def start_processes(cpu: bool = False) -> PartialState:
    """The state of this process among those that torchrun or `accelerate launch` started.

    Raises:
        EvaluationError: as `check_launch`.
    """
    check_launch()
    return PartialState(cpu=cpu, timeout=PATIENCE)


def on_main(state: PartialState, action: Callable[[], T]) -> T:
    """Run `action` on the main process. Returns its result on all processes.

    Raises:
        EvaluationError: `action` raised a `ValueError` or an `OutputError`; raised on all processes.
    """
    if state.num_processes == 1:
        return action()
    outcome: list[object] = [None, ""]
    if state.is_main_process:
        try:
            outcome[0] = action()
        except (ValueError, OutputError) as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1]:
        raise EvaluationError(str(outcome[1]))
    return cast(T, outcome[0])


def on_all(state: PartialState, action: Callable[[], T]) -> T:
    """Run `action` on every process. Returns its result on this one, if it succeeded on all.

    Raises:
        EvaluationError: `action` raised a `ValueError` on one of them; raised on all processes.
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
