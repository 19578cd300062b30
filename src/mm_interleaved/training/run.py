"""A training run from its settings to the final model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from torch import nn
from transformers import TrainingArguments

from .. import __version__
from ..configuration import describe_differences, read_settings, to_yaml
from ..data import DocumentLoader, build_loader
from ..generation import MMInterleaved
from ..io import InputError, atomic_folder, lock_fresh_folder, read_json, write_atomic, write_json
from ..launch import join_processes, peers
from ..launch.traces import trace_collectives
from ..model.language_model import MMFSDecoderLayer
from ..processor import MMInterleavedProcessor
from . import sharding
from .adapters import TrainedAdapter
from .arguments import divides, training_arguments, zero_stage
from .building import build
from .callbacks import LOG, DataReportCallback, Reporter, TrainingLoopCallback
from .checkpointing import enable_checkpointing
from .checkpoints import BEST, SETTINGS, find_resume, step_of
from .config import RunConfig, TrainConfig
from .distillation import ConditionDistillation
from .epochs import length_of_run
from .flops import step_cost
from .graphs import CapturedStep
from .pipeline import BatchPipeline, Loader, prepare_documents
from .publishing import Push
from .report import write_run_report
from .samples import Samples
from .signals import StopOnSignal
from .stopping import EarlyStopping
from .tasks import Tasks
from .trainer import RunTrainer

FINAL = "final"
TRAINED = "trained.json"  # in that folder: the steps, seed and version that made it
BLOCKS = {  # the compiled blocks by value of `compile`
    "none": (),
    "regional": sharding.BLOCKS,
    "decoder": (MMFSDecoderLayer,),
}


def train(
    config: TrainConfig,
    default_tokenizer: Path | None = None,
    device: str | None = None,
    make_loader: Callable[..., Loader] = build_loader,
) -> str | None:
    """Train a model of documents.

    Args:
        config: settings of the run.
        default_tokenizer: folder or file of the tokenizer for presets without one.
        device: "cpu" for the CPU; None: an accelerator if there is one.
        make_loader: makes the loader of `data` and of `eval_data`, with the arguments of `data.build_loader`.

    Returns:
        None if the run is finished; otherwise the name of the signal that stopped it (a checkpoint was saved).

    Raises:
        ValueError: settings do not fit together, or the run cannot be resumed.
        TrainingError: a loss or a trained weight is not finite.
    """
    args = join_run(config, device)
    console = Console(stderr=True, soft_wrap=True, quiet=args.process_index > 0)
    with start_run(config, args) as resume:
        model, processor = build(config, default_tokenizer, args.device)
        distillation = ConditionDistillation(model, config.losses.conditions) if config.losses.conditions else None
        if config.gradient_checkpointing:
            enable_checkpointing(model, config.selective_checkpointing)
        compile_regions(model, config.compile)
        cost = step_cost(model.config, model) if config.peak_tflops or args.device.type == "cuda" else None
        ranks = {"rank": args.process_index, "world_size": args.world_size}
        prepare = prepare_documents(model, config.losses, config.shapes)
        pushed = Push(config.push_to_hub, Path(config.output)) if config.push_to_hub is not None else None

        def pipeline_of(data: Any, seed: int) -> BatchPipeline:
            return BatchPipeline(make_loader(data, processor, **ranks), prepare, seed, args.device, **ranks)

        evaluation = None
        if config.eval_data is not None:
            evaluation = lambda: (pipeline_of(config.eval_data, config.seed + 1), config.eval_batches)  # noqa: E731
        pipeline = pipeline_of(config.training_data, config.seed)
        own = pipeline.loader if config.replay is None else make_loader(config.data, processor, **ranks)
        length = length_of_run(config, own, args, console)
        args.max_steps = length.steps
        adapter = TrainedAdapter.of(config, model, processor)
        in_step = divides(config) or zero_stage(config) == 3  # every process gathers every block
        branches = branches_of(config) if in_step else None
        trainer = RunTrainer(
            model, args, config, pipeline, evaluation,
            processor.save_pretrained if adapter is None else adapter.save_info, cost,
            distillation, branches, config.losses.scale == "global",
        )  # fmt: skip
        trainer.adapter = adapter
        if adapter is not None:
            console.print(adapter.describe(), highlight=False)
        trainer.steps_per_epoch = length.steps_per_epoch
        finish = lambda folder: save_final(trainer, model, processor, folder)  # noqa: E731
        trainer.write_best = finish
        if config.shapes.graph:
            trainer.captured = _captured_step(trainer, config)
        _add_callbacks(trainer, config, model, processor, console)
        stopped = run(trainer, config, resume, console, finish)
        if stopped is None and pushed is not None and args.process_index == 0:
            pushed.send(Path(config.output) / FINAL, console)
        return stopped


def _captured_step(trainer: RunTrainer, config: TrainConfig) -> CapturedStep:
    """The step of a run with `shapes.graph`.

    Raises:
        ValueError: it cannot be captured on this device, or with a divided model.
    """
    args = trainer.args
    if args.device.type != "cuda" or divides(config) or config.deepspeed:
        raise ValueError(f"shapes.graph needs CUDA devices (this is {args.device.type}), each with the whole model "
                         "(no fsdp, no deepspeed)")  # fmt: skip
    return CapturedStep(config.shapes, args.world_size, trainer.compute_outputs)


def _add_callbacks(
    trainer: RunTrainer, config: TrainConfig, model: MMInterleaved, processor: MMInterleavedProcessor, console: Console
) -> None:
    """Add what happens between steps: early stopping, the report on the data, samples, and evaluations on tasks."""
    if config.early_stopping is not None:
        trainer.stopping = EarlyStopping(config.early_stopping)
        trainer.add_callback(trainer.stopping)
    loader, is_main = trainer.pipeline.loader, trainer.args.process_index == 0
    if isinstance(loader, DocumentLoader):
        trainer.add_callback(DataReportCallback(loader, Path(config.output), trainer.args.process_index, console))
    has_samples = config.samples.documents is not None or config.samples.from_data
    if trainer.is_fsdp_enabled and (config.sample_every or config.evaluate_every):
        sharding.check_gathering()
    if config.sample_every and has_samples and (is_main or trainer.is_fsdp_enabled):
        trainer.add_callback(Samples(trainer, config, model, processor))
    if config.evaluate_every and config.evaluation is not None:
        trainer.add_callback(Tasks(trainer, config, config.evaluation, model, processor, trainer.stopping))


def branches_of(config: TrainConfig) -> sharding.ForceAllBranches:
    """The branches of the model that any batch of the run takes."""
    sources = [s for data in (config.training_data, config.eval_data) if data is not None for s in data.sources]
    text = config.losses.text or any(s.loss_text_weight for s in sources)
    image = config.losses.image or any(s.loss_image_weight for s in sources)
    return sharding.ForceAllBranches(bool(text), bool(image), bool(config.losses.conditions))


def join_run(config: RunConfig, device: str | None) -> TrainingArguments:
    """The settings of the Trainer, once this process has joined the others of the run; see `training_arguments`."""
    join_processes()
    trace_collectives(Path(config.output))
    args = training_arguments(config, device)
    peers.connect()
    return args


@contextmanager
def start_run(config: RunConfig, args: TrainingArguments) -> Iterator[Path | None]:
    """Make the run's folder and hold it; yields the checkpoint to resume from. A refused start leaves nothing in it.

    The first process alone locks the folder and reads checkpoints to find damage. If it fails, the others end.

    Raises:
        OutputError: another run holds the folder, or it cannot be written.
    """
    folder, is_first = Path(config.output), args.process_index == 0
    logged, saved = _progress(folder)

    def is_begun() -> bool:
        now = _progress(folder)
        return now[0] > logged or now[1] != saved

    try:
        with lock_fresh_folder(folder, is_begun) if is_first else nullcontext():
            found = [find_resume(folder, config.resume) if is_first else None]
            if args.world_size > 1:
                with peers.explained():
                    dist.broadcast_object_list(found, 0, device=args.device)
            if config.tf32 and torch.cuda.is_available():
                torch.set_float32_matmul_precision("high")
            yield found[0]
    finally:
        peers.disconnect(sys.exception())


def _progress(folder: Path) -> tuple[int, list[str]]:
    """What a run has trained so far, as far as its folder shows: the size of its log, and its checkpoints."""
    if not os.path.isdir(folder):  # `Path.is_dir` fails for a name that is too long; locking the folder refuses it
        return 0, []
    log, saved = folder / LOG, [*folder.glob("checkpoint-*"), *folder.glob(FINAL)]
    return log.stat().st_size if log.is_file() else 0, sorted(path.name for path in saved)


def run(
    trainer: RunTrainer, config: RunConfig, resume: Path | None, console: Console, finish: Callable[[Path], None]
) -> str | None:
    """Train, and write the `final` folder at the end; see `train`."""
    stop = StopOnSignal(console)
    trainer.add_callback(TrainingLoopCallback(trainer, config))
    trainer.add_callback(stop)
    if trainer.is_fsdp_enabled:
        trainer.add_callback(sharding.ShardingCallback(console))
    folder, steps, is_main = Path(config.output) / FINAL, trainer.args.max_steps, trainer.args.process_index == 0
    last = 0 if resume is None else step_of(resume)
    if is_main:
        trainer.add_callback(Reporter(config, console))
        assert trainer.model is not None
        count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        where = f"{trainer.args.world_size} x {trainer.args.device.type}"
        console.print(f"{count:,} trainable parameters on {where}, {config.precision}; run in {config.output}")
        if config.schedule.warmup_steps >= steps:
            console.print(
                f"the warm-up (schedule.warmup_steps: {config.schedule.warmup_steps}) is as long as the run of {steps} "
                "steps, so the learning rate never reaches its value",
                style="yellow",
            )
    if resume is not None:
        trainer.load_run_state(resume)
        console.print(f"going on from {resume}")
    is_over = last >= steps or (trainer.stopping is not None and trainer.stopping.is_over)
    settings = folder.with_name(SETTINGS)
    before = settings.read_text() if is_main and resume is not None and settings.is_file() else ""
    if is_main and not (resume is not None and is_over and settings.is_file()):  # those that trained the weights stay
        if resume is not None:
            _tell_new_length(resume, steps, console)
        write_atomic(settings, to_yaml(config))
    if resume is not None and is_over:
        if is_main:
            _tell_changes(config, console)
        if _trained_steps(folder) == last:
            console.print(f"done already: {folder}")
            return None
        trainer.load_weights(resume)
    else:
        try:
            peers.meet("the start of training", trainer.args.ddp_timeout)
            with peers.explained():
                trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        except InputError:
            if before and trainer.state.global_step <= last:  # nothing was trained with the new settings
                write_atomic(settings, before)
            raise
        if trainer.stopping is not None:
            trainer.stopping.check()
        last = trainer.state.global_step
    if stop.stopped_by is not None and last < steps and not (trainer.stopping is not None and trainer.stopping.is_over):
        console.print(
            f"stopped by {stop.stopped_by} at step {last} of {steps}; a checkpoint is saved, and the same command "
            f"resumes from there"
        )
        return stop.stopped_by
    trainer.check_finite(last)
    finish(folder)
    if is_main:
        about = {"steps": last, "seed": config.seed, "version": __version__}
        write_json(folder / TRAINED, about)
        write_run_report(folder.parent)  # which says that the run is finished
    if trainer.stopping is not None:
        _tell_best(trainer.stopping, last, steps, folder.parent, console)
    console.print(f"done: {folder}")
    return None


def _tell_new_length(checkpoint: Path, steps: int, console: Console) -> None:
    """Print what a number of steps means that is not that of the resumed checkpoint."""
    before = read_json(checkpoint / "trainer_state.json").get("max_steps")
    if before != steps:
        console.print(f"the run had {before:,} steps and now has {steps:,}: from here on the learning rate is that of "
                      f"a schedule of {steps:,} steps")  # fmt: skip


def _tell_best(stopping: EarlyStopping, last: int, steps: int, folder: Path, console: Console) -> None:
    if last < steps:
        console.print(f"stopped early at step {last} of {steps}: no improvement in {stopping.waited} evaluations; "
                      "a larger 'early_stopping.patience' goes on")  # fmt: skip
    console.print(f"{stopping.describe()}: {folder / BEST}", highlight=False)


def _tell_changes(config: RunConfig, console: Console) -> None:
    """Print which settings of a run at its end have no effect, because its weights were trained with others."""
    path = Path(config.output) / SETTINGS
    before, now = read_settings(path), yaml.safe_load(to_yaml(config))
    for settings in (before, now):
        settings.pop("push_to_hub", None)  # it has an effect after the end
    changes = describe_differences(before, now)
    if changes:
        console.print(f"nothing is left to train, so settings that differ from {path} have no effect: {changes}")


def _trained_steps(folder: Path) -> int | None:
    """After how many steps a `final` folder was written; None: there is none, or it does not say."""
    try:
        return read_json(folder / TRAINED)["steps"]
    except (InputError, KeyError, TypeError):
        return None


def destroy_process_group() -> None:
    """Destroy the process group, if there is one, at the end of a program.

    If it still exists when the interpreter ends, threads that wait for other processes may abort the program.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def save_final(trainer: RunTrainer, model: MMInterleaved, processor: MMInterleavedProcessor, folder: Path) -> None:
    """Write the trained model or adapter, with averaged weights if there are any, as a folder of its own."""
    with trainer.averaged():
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            trainer.save_gathered(folder)
        elif trainer.args.should_save:
            with atomic_folder(folder, replace=True) as aside:
                if trainer.adapter is not None:
                    trainer.adapter.save(aside)
                else:
                    model.save_pretrained(aside)
                    processor.save_pretrained(aside)


def compile_regions(model: nn.Module, which: str = "regional", backend: str = "inductor") -> None:
    """Compile the repeated blocks one by one, which gives fewer and larger kernels; equal blocks are compiled once.

    Compiled as a whole, a small model had not finished its first step after 80 s on an H200.

    Args:
        model: the trained model.
        which: "regional" for all kinds of blocks; "decoder" for the language model's layers, of which there are two
            kinds only, with MMFS and without; "none".
        backend: backend of PyTorch's compiler.

    Raises:
        ValueError: there are no such blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS[which])]
    if not blocks and which != "none":
        raise ValueError(f"compile: {which} finds nothing to compile in this model; take none or regional")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # sizes of a UNet's blocks
    for module in blocks:
        module.compile(dynamic=False, backend=backend)
