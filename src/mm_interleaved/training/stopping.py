"""The best checkpoint by a task metric, and the end of a run that no longer improves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..io import InputError, close_name, read_json, sentences
from .config import EarlyStoppingConfig, TrainingError

ERRORS = ("fid", "mean_rank", "unparsed")  # beginnings of values that are best when small


class EarlyStopping(TrainerCallback, ExportableState):
    """Follows a task metric. Its state is in the Trainer's part of a checkpoint, so a resumed run decides the same.

    Attributes:
        best_value, best_step: the best value so far, and the step of its weights; None: no evaluation so far.
        waited: number of evaluations since then.
    """

    def __init__(self, config: EarlyStoppingConfig) -> None:
        self.config = config
        value = config.metric.rpartition("/")[2]
        self.mode = config.mode or ("min" if value.startswith(ERRORS) else "max")
        self.best_value: float | None = None
        self.best_step: int | None = None
        self.waited = 0
        self.problem: str | None = None  # ends the run after its checkpoint is written

    def check_name(self, known: Sequence[str] | None) -> None:
        """Check that the task's metrics have the value.

        Args:
            known: the names of their values; None: unknown, so the first evaluation decides.

        Raises:
            InputError: they do not.
        """
        value = self.config.metric.rpartition("/")[2]
        if known is not None and value not in known:
            raise InputError(f"task '{self.config.task}' has no value '{value}', only {', '.join(known)}",
                             "early_stopping.metric", close_name(value, known))  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores, in the form that the Trainer asks for."""
        followed = {"metric": self.config.metric, "mode": self.mode}
        best = {"best_value": self.best_value, "best_step": self.best_step, "waited": self.waited}
        return {"args": {}, "attributes": followed | best}

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Continue from the state in a checkpoint, if it followed the same metric."""
        found = stored.get(type(self).__name__, {}).get("attributes", {})
        if (found.get("metric"), found.get("mode")) == (self.config.metric, self.mode):
            self.best_value, self.best_step, self.waited = found["best_value"], found["best_step"], found["waited"]

    def load(self, checkpoint: Path) -> None:
        """Continue from the state in a checkpoint's folder."""
        self.restore(read_json(checkpoint / "trainer_state.json", dict).get("stateful_callbacks", {}))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue from the state of a resumed run."""
        if isinstance(state.stateful_callbacks, dict):  # a list before the Trainer's state is complete
            self.restore(state.stateful_callbacks)

    @property
    def is_over(self) -> bool:
        """Whether the run should stop."""
        return self.config.patience is not None and self.waited >= self.config.patience

    def judge(self, step: int, values: Mapping[str, float], control: TrainerControl) -> None:
        """Compare the values of an evaluation with the best; every process calls this with the same values.

        A checkpoint is requested for the best weights, and where the run stops. If the metric is not among the values,
        the run stops too, so that no step is lost; `check` raises the error after that.

        Args:
            step: the step of the evaluated weights.
            values: values by `TASK/VALUE`.
            control: gets the requests.
        """
        if self.config.metric not in values:
            known = ", ".join(values) or "no value at all"
            self.problem = sentences(
                f"early_stopping.metric '{self.config.metric}' is not among the values of the evaluation at step "
                f"{step}: {known}",
                close_name(self.config.metric, values),
                "The evaluation's folder says why a value is missing",
                "A checkpoint of this step is saved: the same command with another metric resumes from there",
            )
            control.should_save = control.should_training_stop = True
            return
        value = values[self.config.metric]
        if self._is_better(value):
            self.best_value, self.best_step, self.waited = value, step, 0
            control.should_save = True
        else:
            self.waited += 1
        if self.is_over:
            control.should_save = control.should_training_stop = True

    def check(self) -> None:
        """Check that the run did not stop because an evaluation lacked the metric.

        Raises:
            TrainingError: it did.
        """
        if self.problem is not None:
            raise TrainingError(self.problem)

    def _is_better(self, value: float) -> bool:
        if value != value:
            return False
        gain = 0.0 if self.best_value is None else value - self.best_value
        return self.best_value is None or (gain if self.mode == "max" else -gain) > self.config.min_delta

    def describe(self) -> str:
        """The decision in one line."""
        if self.best_value is None:
            return f"{self.config.metric}: not evaluated"
        return f"{self.config.metric} {self.best_value:.4g} at step {self.best_step}, best of all evaluations"
