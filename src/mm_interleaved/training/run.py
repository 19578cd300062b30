"""A training run from its settings to its end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from toyworld.curriculum.autoencoder import STATISTICS_BATCHES, AutoencoderTask, latent_scale, save_autoencoder
from toyworld.curriculum.images import ImageLoader, ImageSet, ToyScenes, ToyTexts, images_of
from toyworld.curriculum.language import WEIGHTS as LANGUAGE
from toyworld.curriculum.language import LanguageTask
from toyworld.curriculum.parts import save_part
from toyworld.curriculum.vision import WEIGHTS as VISION
from toyworld.curriculum.vision import VisionTask

from ..checkpoints.checkpoint import written_aside
from ..configuration import to_yaml
from ..data import DocumentLoader, build_loader
from ..generation import MMInterleaved
from ..model.language_model import MMFSDecoderLayer
from ..processor import MMInterleavedProcessor
from . import sharding
from .building import build, build_config, build_tokenizer, given_model, load_language, load_vision
from .callbacks import DataReportCallback, Reporter, TrainingLoopCallback
from .checkpointing import enable_checkpointing
from .checkpoints import find_resume, step_of
from .config import AutoencoderRunConfig, ImagesConfig, PartRunConfig, RunConfig, TrainConfig
from .distillation import ConditionDistillation
from .flops import step_cost
from .graphs import CapturedStep
from .pipeline import (
    BatchPipeline,
    Loader,
    Prepare,
    prepare_documents,
    prepare_images,
    prepare_scenes,
    prepare_texts,
)
from .samples import Samples
from .tasks import Tasks
from .trainer import RunTrainer, training_arguments

FINAL = "final"
BLOCKS = {  # what `compile` compiles, by its value
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
        config: the run.
        default_tokenizer: folder or file of the tokenizer for presets that name none.
        device: "cpu" to stay there; None: an accelerator if there is one.
        make_loader: makes the loader of `data` and of `eval_data`, called as `data.build_loader` is.

    Returns:
        None when it ran to its end; otherwise the name of the signal that stopped it (a checkpoint was saved).

    Raises:
        ValueError: settings do not fit, or nothing can be resumed.
        TrainingError: a loss was not finite.
    """
    console = Console(stderr=True, soft_wrap=True, quiet=int(os.environ.get("RANK", "0")) > 0)
    resume = start_run(config)
    args = training_arguments(config, device)
    model, processor = build(config, default_tokenizer)
    distillation = ConditionDistillation(model, config.losses.conditions) if config.losses.conditions else None
    if config.gradient_checkpointing:
        enable_checkpointing(model, config.selective_checkpointing)
    compile_regions(model, config.compile)
    cost = step_cost(model.config) if config.peak_tflops or args.device.type == "cuda" else None
    ranks = {"rank": args.process_index, "world_size": args.world_size}
    prepare = prepare_documents(model, config.losses, config.shapes)

    def pipeline_of(data: Any, seed: int) -> BatchPipeline:
        return BatchPipeline(make_loader(data, processor, **ranks), prepare, seed, args.device, **ranks)

    evaluation = None
    if config.eval_data is not None:
        evaluation = lambda: (pipeline_of(config.eval_data, config.seed + 1), config.eval_batches)  # noqa: E731
    trainer = RunTrainer(
        model, args, config, pipeline_of(config.data, config.seed), evaluation, processor.save_pretrained, cost,
        distillation, branches_of(config) if config.fsdp else None,
    )  # fmt: skip
    if config.shapes.graph:
        if args.device.type != "cuda" or config.fsdp or config.deepspeed:
            raise ValueError(
                f"shapes.graph needs CUDA devices (this is {args.device.type}), each with the whole model (no fsdp, no "
                "deepspeed)"
            )
        trainer.captured = CapturedStep(config.shapes, args.world_size, trainer.compute_outputs)
    loader = trainer.pipeline.loader
    if isinstance(loader, DocumentLoader):
        trainer.add_callback(DataReportCallback(loader, Path(config.output), args.process_index, console))
    if config.sample_every and config.samples.documents and args.process_index == 0:
        trainer.add_callback(Samples(trainer, config, model, processor))
    if config.evaluate_every and config.evaluation is not None:
        trainer.add_callback(Tasks(trainer, config, config.evaluation, model, processor))
    return run(trainer, config, resume, console, lambda folder: save_final(trainer, model, processor, folder))


def branches_of(config: TrainConfig) -> sharding.ForceAllBranches:
    """The branches of the model that any batch of the run takes."""
    sources = [s for data in (config.data, config.eval_data) if data is not None for s in data.sources]
    text = config.losses.text or any(s.loss_text_weight for s in sources)
    image = config.losses.image or any(s.loss_image_weight for s in sources)
    return sharding.ForceAllBranches(bool(text), bool(image), bool(config.losses.conditions))


def train_autoencoder(config: AutoencoderRunConfig, device: str | None = None) -> str | None:
    """Train an image autoencoder; arguments, result and errors as for `train`.

    The `final` folder is a diffusers VAE, for `model.vae` of `train`.
    """
    side = config.autoencoder.image_size
    latents = (config.autoencoder.latent_channels, *[side // 2 ** (len(config.autoencoder.block_out_channels) - 1)] * 2)

    def make() -> AutoencoderTask:
        task = AutoencoderTask(config.autoencoder, config.losses)
        if config.gradient_checkpointing:
            task.vae.enable_gradient_checkpointing()
        if config.compile == "regional":
            task.vae.encoder.compile()
            task.vae.decoder.compile()
        else:
            compile_regions(task, config.compile)
        return task

    def finish(trainer: RunTrainer, folder: Path) -> None:
        finish_autoencoder(trainer, cast(AutoencoderTask, trainer.model), folder)

    return _train_part(config, make, lambda data: images_of(data, side), prepare_images(latents), finish, device)


def train_vision(config: PartRunConfig, default_tokenizer: Path | None = None, device: str | None = None) -> str | None:
    """Train a visual tokenizer; arguments, result and errors as for `train`.

    The `final` folder is for `model.vision` of `train`.
    """
    model = build_config(config.model, default_tokenizer)
    side = model.vision_config.image_size

    def make() -> VisionTask:
        task = VisionTask(model)
        if (given := given_model(config.model, model)) is not None:
            task.visual_tokenizer.load_state_dict(given.visual_tokenizer.state_dict())
        if config.model.vision is not None:
            load_vision(task.visual_tokenizer, config.model.vision)
        compile_regions(task, config.compile)
        return task

    finish = _keep(VisionTask.weights, VISION)
    return _train_part(config, make, lambda data: ToyScenes(data, side), prepare_scenes, finish, device)


def train_language(
    config: PartRunConfig, default_tokenizer: Path | None = None, device: str | None = None
) -> str | None:
    """Train a language model and the conditions of drawings on texts; arguments, result and errors as for `train`.

    The `final` folder is for `model.language` of `train`.
    """
    model = build_config(config.model, default_tokenizer)
    tokenizer = build_tokenizer(config.model, default_tokenizer)

    def make() -> LanguageTask:
        task = LanguageTask(model)
        if (given := given_model(config.model, model)) is not None:
            task.model.load_state_dict(given.state_dict())
        if config.model.language is not None:
            load_language(task.model, config.model.language)
        compile_regions(task, config.compile)
        return task

    def texts(data: ImagesConfig) -> ToyTexts:
        return ToyTexts(data, tokenizer, model.soi_token_id)

    return _train_part(config, make, texts, prepare_texts, _keep(LanguageTask.weights, LANGUAGE), device)


def _keep(state: Callable[[Any], dict[str, Tensor]], name: str) -> Callable[[RunTrainer, Path], None]:
    """Writes a part's weights, averaged if an average was kept, and how well it does on held-out scenes."""

    def finish(trainer: RunTrainer, folder: Path) -> None:
        if trainer.args.should_save:
            quality = trainer.evaluate()
            with trainer.averaged(), written_aside(folder, replace=True) as aside:
                save_part(state(trainer.model), quality, aside / name)

    return finish


def _train_part(
    config: AutoencoderRunConfig | PartRunConfig,
    make: Callable[[], nn.Module],
    images: Callable[[ImagesConfig], ImageSet],
    prepare: Prepare,
    finish: Callable[[RunTrainer, Path], None],
    device: str | None,
) -> str | None:
    """Train a part of a model on images: `make` makes it, with its losses, and `finish` writes its `final` folder."""
    console = Console(stderr=True, soft_wrap=True, quiet=int(os.environ.get("RANK", "0")) > 0)
    resume = start_run(config)
    args = training_arguments(config, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        task = make()
    ranks = {"rank": args.process_index, "world_size": args.world_size}

    def pipeline_of(data: ImagesConfig, seed: int) -> BatchPipeline:
        return BatchPipeline(ImageLoader(data, images(data), **ranks), prepare, seed, args.device, **ranks)

    trainer = RunTrainer(
        task,
        args,
        config,
        pipeline_of(config.data, config.seed),
        lambda: (pipeline_of(config.eval_data, config.seed + 1), config.eval_batches),
    )
    return run(trainer, config, resume, console, lambda folder: finish(trainer, folder))


def finish_autoencoder(trainer: RunTrainer, task: AutoencoderTask, folder: Path) -> None:
    """Measure the scale of the latents on held-out images, and write the VAE with it and its quality."""
    if not trainer.args.should_save:
        return
    assert trainer.eval_pipeline is not None
    pipeline, count = trainer.eval_pipeline()
    latents, quality = [], []
    task.eval()
    with trainer.averaged(), torch.no_grad():
        for inputs, _ in zip(pipeline, range(min(count, STATISTICS_BATCHES)), strict=False):
            outputs = task(**inputs)
            latents.append(outputs.latents.float().cpu())
            quality.append([float(outputs.psnr), float(outputs.ssim)])
        found = {name: sum(v) / len(v) for name, v in zip(("psnr", "ssim"), zip(*quality, strict=True), strict=True)}
        scale = latent_scale(torch.cat(latents))
        with written_aside(folder, replace=True) as aside:
            save_autoencoder(task.vae, scale, aside)
            (aside / "quality.json").write_text(json.dumps({**found, "scaling_factor": scale}, indent=2) + "\n")


def start_run(config: RunConfig) -> Path | None:
    """Make the run's folder with its settings in it; the checkpoint to go on from."""
    folder = Path(config.output)
    resume = find_resume(folder, config.resume)
    if int(os.environ.get("RANK", "0")) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / "config.yaml.tmp"
        aside.write_text(to_yaml(config))
        aside.replace(folder / "config.yaml")
    if config.tf32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    return resume


def run(
    trainer: RunTrainer, config: RunConfig, resume: Path | None, console: Console, finish: Callable[[Path], None]
) -> str | None:
    """Train, and write the `final` folder when the end is reached; see `train`."""
    loop = TrainingLoopCallback(trainer, config, console)
    trainer.add_callback(loop)
    if config.fsdp:
        trainer.add_callback(sharding.ShardingCallback(console))
    folder = Path(config.output) / FINAL
    done = folder.exists() and resume is not None and step_of(resume) >= config.steps
    if trainer.args.process_index == 0:
        trainer.add_callback(Reporter(config, console))
        assert trainer.model is not None
        count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        where = f"{trainer.args.world_size} x {trainer.args.device.type}"
        console.print(f"{count:,} trainable parameters on {where}, {config.precision}; run in {config.output}")
    if resume is not None:
        trainer.load_run_state(resume)
        console.print(f"going on from {resume}")
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if loop.stopped_by is not None and trainer.state.global_step < config.steps:
        console.print(
            f"stopped by {loop.stopped_by} at step {trainer.state.global_step} of {config.steps}; a checkpoint is "
            f"saved, and the same command goes on from there"
        )
        return loop.stopped_by
    if not done:
        finish(folder)
    console.print(f"done: {folder}")
    return None


def destroy_process_group() -> None:
    """Destroy the process group, if there is one, at the end of a program.

    If that is left to the end of the interpreter, threads that still listen to other processes may abort it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def save_final(trainer: RunTrainer, model: MMInterleaved, processor: MMInterleavedProcessor, folder: Path) -> None:
    """The trained model, averaged if an average was kept, as a folder that everything else loads."""
    with trainer.averaged():
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            trainer.save_gathered(folder)
        elif trainer.args.should_save:
            with written_aside(folder, replace=True) as aside:
                model.save_pretrained(aside)
                processor.save_pretrained(aside)


def compile_regions(model: nn.Module, which: str = "regional", backend: str = "inductor") -> None:
    """Compile the blocks that repeat, one by one: fewer and larger kernels, and what is alike is compiled once.

    Compiled whole, a small model had not made its first step after 80 s on an H200.

    Args:
        model: whatever is trained.
        which: "regional" for all kinds of blocks; "decoder" for the language model's layers, of which there are two
            kinds only, with MMFS and without; "none".
        backend: of PyTorch's compiler.

    Raises:
        ValueError: there are no such blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS[which])]
    if not blocks and which != "none":
        raise ValueError(f"compile: {which} finds nothing to compile in what is trained here; take none or regional")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # sizes of a UNet's blocks
    for module in blocks:
        module.compile(dynamic=False, backend=backend)
