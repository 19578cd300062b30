"""Callbacks of the training loop: log, TensorBoard, averaged weights and evaluation."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data import DocumentLoader
from ..data.loader import WORK
from ..io import append, json_lines, parse_json, write_atomic, write_json, writing
from .config import RunConfig
from .report import write_run_report
from .trainer import RunTrainer

LOG = "log.jsonl"
FIRST_REPORT = 20.0  # seconds until the page of a run is written for the first time


class TrainingLoopCallback(TrainerCallback):
    """Starts measuring, averages the weights and requests evaluation."""

    def __init__(self, trainer: RunTrainer, config: RunConfig) -> None:
        self.trainer, self.config = trainer, config

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Correct what a resumed run takes over."""
        self.trainer.start_average()
        self.trainer.start_window()
        _follow_schedule(kwargs.get("lr_scheduler"))
        if self.trainer.is_world_process_zero():
            self.trainer.link_checkpoints()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the weights change: a checkpoint must have been copied."""
        if self.trainer.state_writer is not None:
            self.trainer.state_writer.wait_copied()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average the weights before `on_step_end`, where other callbacks use the average."""
        if self.trainer.ema is not None:
            self.trainer.ema.update(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each optimizer step."""
        due = self.config.eval_every and state.global_step % self.config.eval_every == 0
        control.should_evaluate = bool(due and self.trainer.eval_pipeline is not None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for the last checkpoint."""
        if self.trainer.state_writer is not None:
            self.trainer.state_writer.close()


def _follow_schedule(scheduler: Any) -> None:
    """Set the learning rates to those of the schedule at the present step.

    A resumed optimizer has the rates of the run before, which may have had fewer steps.
    """
    if isinstance(scheduler, LambdaLR):
        rates = [base * share(scheduler.last_epoch)
                 for base, share in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]  # fmt: skip
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class DataReportCallback(TrainerCallback):
    """Writes the report of the data at every checkpoint, and prints it at the end.

    Args:
        loader: loader of the training data.
        folder: folder of the run.
        rank: rank of this process; each process writes a file of its own.
        console: console for the report at the end.
    """

    def __init__(self, loader: DocumentLoader, folder: Path, rank: int, console: Console) -> None:
        self.loader, self.path, self.console = loader, folder / f"data-rank{rank}.json", console

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the report into the folder of the run, since it grows with the run."""
        write_json(self.path, {"step": state.global_step, **self.loader.report().to_dict()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print a line for each source and for each reason."""
        self.on_save(args, state, control)
        report = self.loader.report()
        for source in report.sources:
            first, *others = report.lines(source)
            self.console.print("\n  ".join([f"{source}: {first}", *others]), highlight=False, markup=False)


class Reporter(TrainerCallback):
    """Writes `log.jsonl`, TensorBoard files and a line on the console for every log entry; first process only."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.folder = Path(config.output)
        self.writer: SummaryWriter | None = None
        self._began: tuple[float, int] = (0.0, 0)
        self._steps = 0
        self._report_due = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the files. Entries that an interrupted run logged after its last checkpoint are removed."""
        self._began, self._steps = (time.time(), state.global_step), state.max_steps
        self._report_due = time.monotonic() + FIRST_REPORT
        path = self.folder / LOG
        if path.is_file():
            lines = [line for line in path.read_text().splitlines() if _step(line) <= state.global_step]
            write_atomic(path, "".join(f"{line}\n" for line in lines))
        if self.config.tensorboard:
            with writing(self.folder / "tensorboard"):
                self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=state.global_step + 1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write one entry."""
        values = {k: v for k, v in (logs or {}).items() if k not in ("epoch", "total_flos")}
        if not values or "train_runtime" in values:
            return
        append(self.folder / LOG, json_lines([{"step": state.global_step, **values}]))
        if self.writer is not None:
            with writing(self.folder / "tensorboard"):
                for name, value in values.items():
                    self.writer.add_scalar(name, value, state.global_step)
        self.console.print(self._line(state.global_step, values), highlight=False)
        self._write_report()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the files."""
        write_run_report(self.folder)
        if self.writer is not None:
            with writing(self.folder / "tensorboard"):
                self.writer.close()

    def _write_report(self) -> None:
        """Write the page of the run, but use at most a twentieth of the time for it."""
        begin = time.monotonic()
        if begin >= self._report_due:
            write_run_report(self.folder)
            now = time.monotonic()
            self._report_due = now + 20 * (now - begin)

    def _line(self, step: int, values: dict[str, float]) -> str:
        width = len(str(self._steps))
        shown = [f"step {step:{width}}/{self._steps}"]
        if "epochs" in values:
            shown.append(f"epoch {values['epochs']:.2f}")
        shown += [f"{k} {v:.4g}" for k, v in values.items() if k.startswith(("loss", "psnr", "eval_"))]
        for key, name in (("grad_norm", "grad"), ("learning_rate", "lr")):
            if key in values:
                shown.append(f"{name} {values[key]:.3g}")
        if "steps_per_second" in values:
            shown.append(f"{values['steps_per_second']:.2f} steps/s")
            shown.append(f"{_count(values.get('tokens_per_second', 0))} tok/s")
            shown.append(f"{_count(values.get('images_per_second', 0))} img/s")
            work = [f"{name} {values[key]:.0%}" for name in WORK if (key := f"loader_{name}_share") in values]
            shown.append(f"wait {values.get('data_wait_share', 0):.0%}" + (f" ({', '.join(work)})" if work else ""))
        if "captured_share" in values:
            shown.append(f"captured {values['captured_share']:.0%}")
        if "mfu" in values:
            shown.append(f"MFU {values['mfu']:.1%}")
        if "peak_memory_gib" in values:
            shown.append(f"{values['peak_memory_gib']:.1f} GiB")
        if "steps_per_second" in values:
            shown.append(f"left {self._left(step)}")
        return "  ".join(shown)

    def _left(self, step: int) -> str:
        begin, first = self._began
        if step <= first:
            return "?"
        seconds = math.ceil((time.time() - begin) / (step - first) * (self._steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _step(line: str) -> int:
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):  # an incomplete last line of a killed process
        return 2**62


def _count(value: float) -> str:
    for unit in ("", "k", "M"):
        if value < 1000 or unit == "M":
            return f"{value:.3g}{unit}"
        value /= 1000
    return ""
