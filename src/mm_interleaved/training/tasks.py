"""Tasks that a model is given while it is trained; the same code as `mmi evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..evaluation import Results, TaskSuite, evaluate
from ..evaluation.predictions import remove_results
from ..evaluation.processes import on_main
from ..generation import MMInterleaved
from ..processor import MMInterleavedProcessor
from ..tasks import make_task
from .config import TrainConfig
from .trainer import RunTrainer

FOLDER = "evaluation"


class Tasks(TrainerCallback):
    """Evaluates every `evaluate_every` steps, on all processes together, with the averaged weights if there are any.

    Args:
        trainer: of the run.
        config: of the run.
        suite: the tasks.
        model, processor: what is trained.

    Raises:
        InputError: a task's files cannot be read. Better now than after the first thousand steps.
    """

    def __init__(
        self,
        trainer: RunTrainer,
        config: TrainConfig,
        suite: TaskSuite,
        model: MMInterleaved,
        processor: MMInterleavedProcessor,
    ) -> None:
        self.trainer, self.config, self.suite = trainer, config, suite
        self.model, self.processor = model, processor
        for task in suite.chosen():
            next(make_task(task).samples())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """When it is time."""
        if state.global_step % self.config.evaluate_every == 0:
            due = control.should_log
            self.run(state.global_step)
            control.should_log = due  # logging the scores would have dropped the losses of this step

    def run(self, step: int) -> None:
        """Evaluate and log. Training is as it was before, its random numbers included."""
        folder = Path(self.config.output) / FOLDER / f"{step:07}"
        processes = PartialState()
        # What a run left that was interrupted after this step; its weights need not be these.
        on_main(processes, lambda: remove_results(folder))
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        self.model.eval()
        trainer = self.trainer
        with (
            torch.random.fork_rng(devices=devices),
            trainer.uncompiled(),
            trainer.averaged(),
            trainer.accelerator.autocast(),
        ):
            name = f"step {step}"
            found = evaluate(
                self.suite, self.model, self.processor, folder, name=name, weights=name, state=processes
            )  # fmt: skip
        self.model.train()
        if found is not None:
            trainer.log(main_values(found))


def main_values(results: Results) -> dict[str, float]:
    """For the log: the main value of each metric, which is its first."""
    return {
        f"eval_{name}/{key}": result["values"][key]
        for name, task in results.tasks.items()
        for result in task.metrics.values()
        for key in list(result["values"])[:1]
    }
