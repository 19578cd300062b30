"""Start of processes, and functions that run on one or all of them and raise their errors on all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..io import OutputError
from ..launch import join_processes, peers
from .config import EvaluationError

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # a process may finish long before the slowest


def start_processes(cpu: bool = False) -> PartialState:
    """The state of this process among those that torchrun, `accelerate launch` or srun started.

    Raises:
        LaunchError: they were started in a way that cannot work.
    """
    join_processes()
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    peers.connect()
    return state


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
