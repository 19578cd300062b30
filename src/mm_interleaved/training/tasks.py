"""Evaluation of tasks during training, by the code of `mmi evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..evaluation import Results, TaskSuite, evaluate
from ..evaluation.predictions import remove_results
from ..evaluation.processes import on_main
from ..evaluation.report import shown_values
from ..evaluation.scoring import known_values
from ..generation import MMInterleaved
from ..processor import MMInterleavedProcessor
from ..tasks import make_task
from .config import TrainConfig
from .stopping import EarlyStopping
from .trainer import RunTrainer

FOLDER = "evaluation"


class Tasks(TrainerCallback):
    """Evaluates every `evaluate_every` steps, on all processes together, with the averaged weights if there are any.

    Args:
        trainer: trainer of the run.
        config: settings of the run.
        suite: the tasks.
        model, processor: the trained model and its processor.
        stopping: gets the values of each evaluation; None: none.

    Raises:
        InputError: a task's files cannot be read, or its metrics do not have the value that early stopping follows.
            This is checked before the first step.
    """

    def __init__(
        self,
        trainer: RunTrainer,
        config: TrainConfig,
        suite: TaskSuite,
        model: MMInterleaved,
        processor: MMInterleavedProcessor,
        stopping: EarlyStopping | None = None,
    ) -> None:
        self.trainer, self.config, self.suite, self.stopping = trainer, config, suite, stopping
        self.model, self.processor = model, processor
        for settings in suite.chosen():
            task = make_task(settings)
            next(task.samples())
            if stopping is not None and task.name == stopping.config.task:
                stopping.check_name(known_values(task))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate every `evaluate_every` steps."""
        if state.global_step % self.config.evaluate_every == 0:
            due = control.should_log
            values = self.run(state.global_step)
            control.should_log = due  # logging the scores resets this, and the losses of this step would be lost
            if self.stopping is not None:
                self.stopping.judge(state.global_step, values, control)

    def run(self, step: int) -> dict[str, float]:
        """Evaluate and log. Returns all main values on every process, by `TASK/VALUE`.

        The state of training and its random numbers do not change.
        """
        folder = Path(self.config.output) / FOLDER / f"{step:07}"
        processes = PartialState()
        # Remove results of a run that was interrupted after this step, because its weights may differ.
        on_main(processes, lambda: remove_results(folder))
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        self.model.eval()
        trainer = self.trainer
        with (
            torch.random.fork_rng(devices=devices),
            trainer.uncompiled(),
            trainer.averaged(),
            trainer.whole(),
            trainer.accelerator.autocast(),
        ):
            name = f"step {step}"
            found = evaluate(
                self.suite, self.model, self.processor, folder, name=name, weights=name, state=processes
            )  # fmt: skip
        self.model.train()
        if found is not None:
            trainer.log(main_values(found))
        return on_main(processes, lambda: {} if found is None else all_values(found))


def main_values(results: Results) -> dict[str, float]:
    """The main value of each metric, which is its first one, for the log."""
    return {
        f"eval_{name}/{key}": result["values"][key]
        for name, task in results.tasks.items()
        for result in task.metrics.values()
        for key in list(result["values"])[:1]
    }


def all_values(results: Results) -> dict[str, float]:
    """The values of all metrics, by `TASK/VALUE`, without means over a part of the samples."""
    return {f"{name}/{key}": value for name, task in results.tasks.items() for key, value, _ in shown_values(task)}
