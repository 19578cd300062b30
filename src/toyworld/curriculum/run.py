"""Runs of the curriculum: the image autoencoder, the visual tokenizer and the language model of a small model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from mm_interleaved.io import atomic_folder, write_json
from mm_interleaved.training.arguments import training_arguments
from mm_interleaved.training.building import build_config, build_tokenizer, initial_model
from mm_interleaved.training.config import ModelConfig
from mm_interleaved.training.pipeline import BatchPipeline, Prepare
from mm_interleaved.training.run import compile_regions, run, start_run
from mm_interleaved.training.trainer import RunTrainer

from .autoencoder import STATISTICS_BATCHES, AutoencoderTask, latent_scale, save_autoencoder
from .config import AutoencoderRunConfig, ImagesConfig, PartRunConfig
from .images import ImageLoader, ImageSet, ToyScenes, ToyTexts, images_of, prepare_images, prepare_scenes, prepare_texts
from .language import LanguageTask
from .parts import save_part
from .vision import VisionTask


def train_autoencoder(config: AutoencoderRunConfig, device: str | None = None) -> str | None:
    """Train an image autoencoder; arguments, result and errors as for `train`.

    The `final` folder is a diffusers VAE, for `model.weights` of `train`.
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

    The `final` folder is for `model.weights` of `train`.
    """
    model = build_config(config.model, default_tokenizer)
    side = model.vision_config.image_size

    def make() -> VisionTask:
        task = VisionTask(model)
        if _is_given(config.model):
            task.visual_tokenizer.load_state_dict(initial_model(config.model, model).visual_tokenizer.state_dict())
        compile_regions(task, config.compile)
        return task

    finish = _keep(VisionTask.weights, "visual_tokenizer.safetensors")
    return _train_part(config, make, lambda data: ToyScenes(data, side), prepare_scenes, finish, device)


def train_language(
    config: PartRunConfig, default_tokenizer: Path | None = None, device: str | None = None
) -> str | None:
    """Train a language model and the conditions of drawings on texts; arguments, result and errors as for `train`.

    The `final` folder is for `model.weights` of `train`.
    """
    model = build_config(config.model, default_tokenizer)
    tokenizer = build_tokenizer(config.model, default_tokenizer)

    def make() -> LanguageTask:
        task = LanguageTask(model)
        if _is_given(config.model):
            task.model.load_state_dict(initial_model(config.model, model).state_dict())
        compile_regions(task, config.compile)
        return task

    def texts(data: ImagesConfig) -> ToyTexts:
        return ToyTexts(data, tokenizer, model.soi_token_id)

    return _train_part(config, make, texts, prepare_texts, _keep(LanguageTask.weights, "language.safetensors"), device)


def _is_given(source: ModelConfig) -> bool:
    """Whether a part does not start from fresh weights."""
    return source.init_from.preset is None or bool(source.weights)


def _keep(state: Callable[[Any], dict[str, Tensor]], name: str) -> Callable[[RunTrainer, Path], None]:
    """Writes a part's weights, averaged if an average was kept, and how well it does on held-out scenes."""

    def finish(trainer: RunTrainer, folder: Path) -> None:
        if trainer.args.should_save:
            quality = trainer.evaluate()
            with trainer.averaged(), atomic_folder(folder, replace=True) as aside:
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
    with start_run(config) as resume:
        console = Console(stderr=True, soft_wrap=True, quiet=int(os.environ.get("RANK", "0")) > 0)
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
        with atomic_folder(folder, replace=True) as aside:
            save_autoencoder(task.vae, scale, aside)
            write_json(aside / "quality.json", {**found, "scaling_factor": scale})
