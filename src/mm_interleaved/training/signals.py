"""Stopping a run by a signal: all processes save after the same step, then end."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..launch import peers

STOP_NOW = (signal.SIGTERM, signal.SIGINT)  # a second one ends the run at once
SIGNALS = (*STOP_NOW, signal.SIGUSR1)  # SIGUSR1 is what Slurm is asked to send before the time limit
_SAME = 2.0  # seconds within which two signals count as one: `timeout` signals a process, then its group
_AGREE_SECONDS, _AGREE_STEPS = 5.0, 10  # the most between two checks whether another process wants to stop


class StopOnSignal(TrainerCallback):
    """Lets a run save and end after a signal to any of its processes.

    Attributes:
        stopped_by: name of the signal; "another process": it got one; None: the run was not stopped.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stopped_by: str | None = None
        self._urgent_at: float | None = None
        self._before: dict[int, Any] = {}
        self._checked: tuple[int, float] = (0, 0.0)
        self._next_check = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Install the signal handlers."""
        self._checked, self._next_check = (state.global_step, time.monotonic()), state.global_step + 1
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each optimizer step."""
        peers.note(f"step {state.global_step}")
        if self._agreed(args, state):
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in STOP_NOW:
            if self._urgent_at is not None and now - self._urgent_at > _SAME:
                signal.signal(number, self._before[number])
                os.kill(os.getpid(), number)
                return
            self._urgent_at = now if self._urgent_at is None else self._urgent_at
        if self.stopped_by is None:
            self.stopped_by = signal.Signals(number).name
            again = "; send it again to stop at once" if number in STOP_NOW else ""
            self.console.print(f"{self.stopped_by}: saving after this step{again}")

    def _agreed(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether any process got a signal; all processes find the same after the same step.

        The check waits for the devices, so it is made every few seconds. All take the longest interval that one of
        them proposes, so that they make the next one after the same step.
        """
        step = state.global_step
        if not (dist.is_available() and dist.is_initialized()):
            return self.stopped_by is not None
        if step < self._next_check and step != state.max_steps:
            return False
        before, begin = self._checked
        now = time.monotonic()
        seconds = max(now - begin, 1e-3) / max(step - before, 1)
        wanted = min(max(_AGREE_SECONDS / seconds, 1), _AGREE_STEPS)
        found = torch.tensor([self.stopped_by is not None, wanted], dtype=torch.float32, device=args.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        stop, interval = found.tolist()
        self._checked, self._next_check = (step, now), step + int(interval)
        if stop and self.stopped_by is None:
            self.stopped_by = "another process"
        return bool(stop)
