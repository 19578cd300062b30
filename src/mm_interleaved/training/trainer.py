"""transformers' Trainer on batches with layouts: losses by part, complete checkpoints, exact resumption."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState

from ..configuration import to_yaml
from ..io import put_in_place, write_atomic, write_json, writing
from ..launch import peers
from ..model import MMInterleavedModel
from . import checkpoints, sharding
from .adapters import TrainedAdapter
from .arguments import divides
from .config import RunConfig, TrainingError
from .counting import CountingTrainer, LossCounts
from .distillation import ConditionDistillation
from .ema import EMA
from .flops import StepCost, peak_flops
from .graphs import CapturedStep
from .meters import Window
from .optimizer import build_optimizer
from .pipeline import BatchPipeline, seed_of
from .sharded_checkpoints import STATE, StateWriter, TrainedState, check_optimizer, is_sharded
from .stopping import EarlyStopping

PARTS = ("loss_", "psnr", "ssim", "accuracy_", "spread")  # prefixes of the outputs that are logged separately


class RunTrainer(CountingTrainer):
    """Trains a model that returns `loss`, and optionally parts of it (`loss_*`) and measures.

    Besides the Trainer's public methods it overrides two that choose the folder of a checkpoint (`_save_checkpoint`,
    `_get_output_dir`), because a checkpoint must not get its name before it is complete, and three that load it
    (`_load_from_checkpoint`, `_load_optimizer_and_scheduler`, `_load_rng_state`), because the Trainer knows no adapter
    that is a part of the model, no sharded state and no other number of processes.

    Args:
        model: the model; frozen parameters stay frozen.
        args: see `training_arguments`.
        config: settings of the run.
        pipeline: yields batches.
        eval_pipeline: makes a new pipeline of held-out batches, and returns their number; None: no evaluation.
        save_extras: writes further files into a folder with weights (the processor).
        cost: cost of a step, for the MFU; None: no MFU.
        distillation: adds its loss to the model's; None: no distillation.
        branches: completes batches for a sharded model; None: batches do not change.
        counted: whether losses are means over a step (`losses.scale: global`), for which each batch of the pipeline has
            its `counts`; otherwise they are means over a batch.

    Attributes:
        captured: runs captured training steps; None: steps are not captured.
        adapter: the adapter that is trained; None: the model's own weights are.
        ema: the averaged weights; None: there are none, or FSDP has not divided the weights yet.
        state_writer: writes sharded checkpoints; None: checkpoints are whole.
        stopping: follows a task metric; None: no checkpoint is the best.
        write_best: writes a model folder with the averaged weights; used for the best one where there is an average.
        steps_per_epoch: for the log; None: not known.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        config: RunConfig,
        pipeline: BatchPipeline,
        eval_pipeline: Callable[[], tuple[BatchPipeline, int]] | None = None,
        save_extras: Callable[[Path], object] = lambda folder: None,
        cost: StepCost | None = None,
        distillation: ConditionDistillation | None = None,
        branches: sharding.ForceAllBranches | None = None,
        counted: bool = False,
    ) -> None:
        self.config, self.pipeline, self.eval_pipeline, self.save_extras = config, pipeline, eval_pipeline, save_extras
        self.distillation, self.branches = distillation, branches
        self.cost, self.peak = cost, peak_flops(args.device, config.peak_tflops)
        self.captured: CapturedStep | None = None
        self.adapter: TrainedAdapter | None = None
        self.stopping: EarlyStopping | None = None
        self.write_best: Callable[[Path], object] = lambda folder: None
        self.steps_per_epoch: float | None = None
        self._aside: Path | None = None
        super().__init__(model=model, args=args)
        if divides(config):
            sharding.configure(self.accelerator, cast(MMInterleavedModel, model))
        else:
            sharding.always_have_a_loss(model)
        self.ema: EMA | None = None
        if not self.is_fsdp_enabled:
            self.start_average()
        self.state_writer = None  # of sharded checkpoints
        if config.fsdp or config.sharded_checkpoints:
            self.state_writer = StateWriter(args.device, config.async_checkpoints)
        self._saved: int | None = None  # the step of the newest checkpoint
        self._same_processes = True  # whether the resumed checkpoint is of as many processes
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = counted  # otherwise the Trainer takes the mean over the batches of a step
        self.window = Window(args.device)

    # ---- methods of the Trainer

    def get_train_dataloader(  # pyright: ignore[reportIncompatibleMethodOverride]  # the Trainer iterates over it only
        self,
    ) -> BatchPipeline:
        """The pipeline, which handles devices and ranks itself."""
        return self.pipeline

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, Muon or the optimizer in `trainer.optim` over the configured groups."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            assert trained is not None
            own = self.get_optimizer_cls_and_kwargs(self.args) if "optim" in self.config.trainer else None
            self.optimizer = build_optimizer(trained, self.config.optimizer, own)
            if self.state_writer is not None:
                check_optimizer(self.optimizer)
        return self.optimizer

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: arithmetic is computed from the counts of the pipeline instead."""
        return 0

    def count(self, batch: Any) -> LossCounts:
        """The counts that the pipeline has put into a batch."""
        return batch["counts"]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of a step and, if losses are means over a step, the numbers of its labels and images."""
        if self.model_accepts_loss_kwargs:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss; its parts are stored for the log."""
        inputs, counts = self._counted(inputs, num_items_in_batch)
        # accelerate adds autocast to models, but not with FSDP2
        with self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext():
            if self.captured is not None and model.training:
                outputs = self.captured(model, inputs)
            else:
                outputs = self.compute_outputs(model, inputs)
        if model.training:
            self.window.add(outputs["loss"], *self._parts(outputs, inputs, counts))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def compute_outputs(self, model: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """The output of `model` for `inputs`, with the losses that training adds."""
        idle: frozenset[str] = frozenset()
        if self.branches is not None:
            inputs, idle = self.branches.complete(cast(MMInterleavedModel, self.model), inputs)
        if self.distillation is None:
            outputs = model(**inputs)
        else:
            outputs = model(**inputs, return_conditions=True)
            with self.accelerator.autocast():
                outputs = self.distillation.add_to(outputs, inputs, idle="loss_distillation" in idle)
        if idle:
            outputs = type(outputs)(**{name: value for name, value in outputs.items() if name not in idle})
        return outputs

    def _counted(
        self, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> tuple[dict[str, Any], LossCounts | None]:
        """The arguments of the model, with what it divides its losses by, and the batch's own counts.

        Gradients are averaged over processes, so a process divides by its share of the items of all. Outside of
        training a batch divides by its own.
        """
        inputs = dict(inputs)
        counts: LossCounts | None = inputs.pop("counts", None)
        if counts is None:
            return inputs, None
        labels, images = num_items, inputs.get("num_images_in_batch")
        if labels is None or images is None:
            labels, images = counts.labels, counts.images
        elif self.args.average_tokens_across_devices:
            labels, images = labels / self.args.world_size, images / self.args.world_size
        return {**inputs, "num_items_in_batch": labels, "num_images_in_batch": images}, counts

    @staticmethod
    def _parts(
        outputs: Mapping[str, Any], inputs: dict[str, Any], counts: LossCounts | None
    ) -> tuple[dict[str, Tensor | None], dict[str, float]]:
        """All parts that such an output can have, so that every rank reduces the same ones, and their items; see
        `Window.add`.
        """
        names = [n for n in getattr(type(outputs), "__dataclass_fields__", {}) if n.startswith(PARTS)]
        parts = {name: outputs.get(name) for name in (*names, *(n for n in outputs if n.startswith(PARTS)))}
        if counts is None:
            return parts, {}
        divided_by = {"loss_txt": inputs["num_items_in_batch"], "loss_img": inputs["num_images_in_batch"]}
        for name, number in divided_by.items():
            value = parts.get(name)
            parts[name] = None if value is None else value * number
        return parts, {"loss_txt": counts.labels, "loss_img": counts.images}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the measurements of the window.

        Raises:
            TrainingError: a loss of the window was NaN or infinite; the batch has been saved.
        """
        if self.state_writer is not None:
            self.state_writer.check()
        if "loss" in logs:
            self._check_losses()
            stats = self.pipeline.take_stats()
            steps = self.state.global_step - self._window_step
            seconds_begin = self.window.begin
            logs |= self.window.close(stats, self.cost, self.peak)
            self.window = Window(self.args.device)
            logs["steps_per_second"] = steps / (self.window.begin - seconds_begin)
            self._window_step = self.state.global_step
            if self.captured is not None:
                logs["captured_share"] = self.captured.take_share()
            if self.steps_per_epoch is not None:
                logs["epochs"] = self.state.global_step / self.steps_per_epoch
            for group in self.optimizer.param_groups:
                logs[f"lr/{group.get('name', 'all')}"] = group["lr"]
        super().log(logs, start_time)

    _window_step = 0

    def start_window(self) -> None:
        """Start measuring."""
        self.pipeline.take_stats()
        self.window = Window(self.args.device)
        self._window_step = self.state.global_step

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean losses over the held-out batches, with the averaged weights if there are any."""
        if self.eval_pipeline is None:
            return {}
        pipeline, count = self.eval_pipeline()
        window = Window(self.args.device)
        model = self.model_wrapped
        assert model is not None
        model.eval()
        with self.uncompiled(), self.averaged(), torch.no_grad(), self.accelerator.autocast():
            for inputs, _number in zip(pipeline, range(count), strict=False):
                given, counts = self._counted(inputs, None)
                outputs = self.compute_outputs(model, given)
                parts, items = self._parts(outputs, given, counts)
                loss: Tensor | None = outputs.get("loss")  # None: nothing in the batch is learned
                window.add(
                    torch.zeros((), device=self.args.device) if loss is None else loss, {"loss": loss, **parts}, items
                )
        model.train()
        measured = window.close(pipeline.take_stats(), None, None)
        logs = {f"eval_{n}": v for n, v in measured.items() if n.startswith(("loss", *PARTS))}
        self.control.should_evaluate = False  # the Trainer would evaluate again at the end of its epoch
        self.log(logs)
        return logs

    def start_average(self) -> None:
        """Start to average the weights, if the settings say so; called when they have got their final memory."""
        if self.ema is None and self.config.ema.decay:
            assert self.model is not None
            self.ema = EMA(self.model, self.config.ema)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the model has its averaged weights, if there are any. At its end no weight is gathered."""
        if self.state_writer is not None:
            self.state_writer.wait_copied()  # a checkpoint has the weights themselves, which change places here
        with self.ema.applied() if self.ema is not None else nullcontext():
            try:
                yield
            finally:
                if self.is_fsdp_enabled:  # before the weights change again
                    assert self.model is not None
                    sharding.reshard(self.model)

    def whole(self) -> Any:
        """A context in which every process has all weights, for work that processes do not do in step; all enter it."""
        if not self.is_fsdp_enabled:
            return nullcontext()
        assert self.model is not None
        return sharding.gathered(self.accelerator, self.model)

    @staticmethod
    def uncompiled() -> Any:
        """A context without compiled code, because other shapes would trigger recompilation."""
        return torch.compiler.set_stance("force_eager")

    # ---- checkpoints

    def _run_folder(self) -> Path:
        assert self.args.output_dir is not None  # `training_arguments` sets it
        return Path(self.args.output_dir)

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._aside or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write everything to a temporary folder, rename it, and remove the oldest checkpoints.

        Raises:
            TrainingError: a loss or a weight is not finite; nothing is written.
        """
        run = self._run_folder()
        name = f"checkpoint-{self.state.global_step}"
        if self._saved == self.state.global_step or run / name in checkpoints.list_checkpoints(run):
            return
        self.check_finite(self.state.global_step)
        if self.state_writer is not None:
            self._save_sharded(self.state_writer, run, name)
            return
        self._aside = run / checkpoints.ASIDE
        if self.args.should_save:
            shutil.rmtree(self._aside, ignore_errors=True)
        self._barrier()
        try:
            with writing(run / name):
                super()._save_checkpoint(model, trial)
                folder = self._aside / name
                torch.save(self.pipeline.state_dict(), folder / self._pipeline_file())
                if self.args.should_save and self.ema is not None:
                    self.ema.save(folder)
                self._barrier()
                if self.args.should_save:
                    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                    write_atomic(folder / checkpoints.SETTINGS, to_yaml(self.config))
                    checkpoints.write_manifest(folder)
                    if self._is_best() and self.ema is not None:
                        self.write_best(run / checkpoints.BEST)
                    self._put_in_place(folder, run / name, self._best_step())
        finally:
            if self.args.should_save:
                shutil.rmtree(self._aside, ignore_errors=True)  # an incomplete folder, after a full disk
            self._aside = None
        self._barrier()

    def _best_step(self) -> int | None:
        return None if self.stopping is None else self.stopping.best_step

    def _put_in_place(self, folder: Path, target: Path, best: int | None) -> None:
        """Give a complete checkpoint its name, and remove the oldest ones but that of step `best`."""
        shutil.rmtree(target, ignore_errors=True)  # a damaged one of that name
        os.replace(folder, target)
        self.link_checkpoints()
        checkpoints.prune(target.parent, self.config.keep_checkpoints, best)

    def _save_sharded(self, writer: StateWriter, run: Path, name: str) -> None:
        """Write a checkpoint of which every process writes its part, perhaps in the background."""
        begin = time.perf_counter()
        writer.wait()  # for the checkpoint before
        folder, is_main = run / checkpoints.ASIDE / name, self.args.should_save
        with writing(run / name):
            if is_main:
                shutil.rmtree(folder.parent, ignore_errors=True)
                (folder / STATE).mkdir(parents=True)
            writer.barrier()
            torch.save(self.pipeline.state_dict(), folder / self._pipeline_file())
            self._save_rng_state(str(folder))
            self._save_scaler(str(folder))
            if is_main:
                torch.save(self._schedule().state_dict(), folder / "scheduler.pt")
                self._export_callbacks()
                self.state.save_to_json(str(folder / "trainer_state.json"))
        if self._is_best():
            self.write_best(run / checkpoints.BEST)
        best = self._best_step()

        def finish(files: dict[str, Any]) -> None:
            if is_main:
                write_atomic(folder / checkpoints.SETTINGS, to_yaml(self.config))
                self.save_extras(folder)
                checkpoints.write_manifest(folder, files)
                self._put_in_place(folder, run / name, best)

        writer.write(self._trained_state().tensors(), folder, run / name, finish)
        self._saved = self.state.global_step
        self.window.saving += time.perf_counter() - begin

    def _schedule(self) -> LRScheduler:
        return cast(LRScheduler, self.lr_scheduler)  # only DeepSpeed has one of another kind

    def _export_callbacks(self) -> None:
        """Put the states of callbacks into the Trainer's state, as its own `_save_checkpoint` does."""
        states = cast("dict[str, Any]", self.state.stateful_callbacks)  # the Trainer has made it a dictionary
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states[type(callback).__name__] = callback.state()

    def _trained_state(self, optimizer: bool = True) -> TrainedState:
        assert self.model is not None
        own = getattr(self.optimizer, "optimizer", self.optimizer) if optimizer else None  # accelerate wraps it
        average = {} if self.ema is None else self.ema.average
        return TrainedState(self.model, own, average, only_trained=self.adapter is not None)

    def _is_best(self) -> bool:
        return self._best_step() == self.state.global_step

    def link_checkpoints(self) -> None:
        """Let `last` stand for the newest checkpoint, and `best` for the best one; first process only."""
        run = self._run_folder()
        own = checkpoints.list_checkpoints(run)
        if own:
            checkpoints.point(run / checkpoints.LAST, own[-1].name)
        best = None if self.stopping is None else run / f"checkpoint-{self.stopping.best_step}"
        if best in own and self.ema is None and self.state_writer is None:
            checkpoints.point(run / checkpoints.BEST, best.name)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights and all other files of a loadable model folder."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.save_extras(Path(output_dir) if output_dir else self._run_folder())

    def save_gathered(self, folder: Path) -> None:
        """`save_model` of sharded parameters, to a temporary folder first; all processes must call it."""
        aside = folder.with_name(f"{folder.name}.incomplete")
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)  # an incomplete folder of a killed run
        self._barrier()
        with writing(folder):
            self.save_model(str(aside))
            self._barrier()
            if self.args.should_save:
                (aside / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                put_in_place(aside, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_sharded(Path(resume_from_checkpoint)):
            return  # its weights are read with the optimizer's state
        if self.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.adapter.load(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.start_average()
        self._trained_state().load(Path(checkpoint), None if self.state_writer is None else self.state_writer.group)
        self._schedule().load_state_dict(torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the global random numbers; other processes than wrote the checkpoint get new ones."""
        if checkpoint is None or self._same_processes:
            super()._load_rng_state(checkpoint)
        else:
            set_seed(seed_of(self.args.seed, self.state.global_step, self.args.process_index) % 2**32)

    def load_weights(self, folder: Path) -> None:
        """The weights of a checkpoint, and their average, where nothing is left to train."""
        self.start_average()
        if is_sharded(folder):
            self._trained_state(optimizer=False).load(folder)
        else:
            self._load_from_checkpoint(str(folder))

    def load_run_state(self, folder: Path) -> None:
        """Restore the state that the Trainer does not handle: the pipeline and the average.

        Raises:
            ValueError: the checkpoint was written for other parameter groups, or its kind does not allow this number of
                processes.
        """
        if self.is_fsdp_enabled and not is_sharded(folder):
            raise ValueError(f"'{folder}' is a whole checkpoint, and 'fsdp' resumes from sharded ones; write one with "
                             "sharded_checkpoints=true, or start anew with model.init_from.checkpoint")  # fmt: skip
        checkpoints.check_groups(folder, self.config)
        self._saved = checkpoints.step_of(folder)
        paths = sorted(folder.glob("feed_*.pt"), key=lambda path: int(path.stem.partition("_")[2]))
        if self.is_deepspeed_enabled and len(paths) != self.args.world_size:
            raise ValueError(
                f"'{folder}' was written by {len(paths)} processes with 'deepspeed', and now there are "
                f"{self.args.world_size}; start as many, or start a new run with model.init_from.checkpoint"
            )
        self._same_processes = len(paths) == self.args.world_size
        self.pipeline.load_states([torch.load(path, weights_only=True) for path in paths])
        if self.stopping is not None:
            self.stopping.load(folder)
        if self.ema is not None and not is_sharded(folder):
            self.ema.load(folder)

    def _pipeline_file(self) -> str:
        return f"feed_{self.args.process_index}.pt"

    def _barrier(self) -> None:
        peers.meet(f"saving after step {self.state.global_step}", self.args.ddp_timeout)

    # ---- losses and weights that are not finite

    def check_finite(self, step: int) -> None:
        """Refuse to save what a diverged run leaves.

        Args:
            step: the step after which the weights are saved.

        Raises:
            TrainingError: a loss since the last log line, or a trained weight, is NaN or infinite.
        """
        self._check_losses()
        assert self.model is not None
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        own = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in trained.items()}
        if not own:
            return
        finite = torch.stack([torch.isfinite(weight).all() for weight in own.values()]).tolist()  # one synchronisation
        bad = [name for name, is_finite in zip(own, finite, strict=True) if not is_finite]
        if bad:
            tensors = f"{len(bad)} of {len(own)} trained tensors are not finite after step {step}, first '{bad[0]}'"
            raise TrainingError(f"{tensors}. {self._advice()}")

    def _check_losses(self) -> None:
        back = self.window.first_bad()
        if back is None:
            return
        folder = self._run_folder() / f"bad-batch-rank{self.args.process_index}"
        numbers = dict(self.pipeline.recent)
        number = self.pipeline.number - back
        step = self.state.global_step - (back - 1) // self.config.accumulation
        place = "Its batch is no longer at hand (log more often)"
        if number in numbers:
            dump_batch(numbers[number], folder, {"step": step, "batch": number, "rank": self.args.process_index})
            place = f"The batch is in '{folder}'"
        raise TrainingError(f"the loss of step {step} is not finite. {place}. {self._advice()}")

    def _advice(self) -> str:
        saved = checkpoints.list_checkpoints(self._run_folder())
        last = f"the last good checkpoint is '{saved[-1]}'" if saved else "no checkpoint was saved before"
        return f"A lower learning rate, more warm-up or precision=float32 may help; {last}"


def dump_batch(batch: Any, folder: Path, about: dict[str, Any]) -> None:
    """Write a batch as `batch.safetensors` and `batch.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in batch.items() if isinstance(v, Tensor)}
    save_file(tensors, folder / "batch.safetensors")
    shapes = {k: list(v.shape) for k, v in tensors.items()}
    about = {**about, "source": getattr(batch, "source", None), "shapes": shapes}
    write_json(folder / "batch.json", about)
