"""Images and texts generated from a few fixed documents during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import PIL.Image
import torch
from diffusers.utils import make_image_grid
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..document import Document, Image, Text, load_documents
from ..generation import MMInterleaved
from ..generation.interleaved import DocumentFinished
from ..generation.settings import GenerationSettings, ImageSettings, TextSettings
from ..io import write_atomic, write_image, writing
from ..io.images import ImageSource, load_image
from ..processor import MMInterleavedProcessor
from .config import TrainConfig
from .trainer import RunTrainer


class Samples(TrainerCallback):
    """Fills the open slots of documents before the first step and every `sample_every` steps.

    Each time with the same seeds, so that only the weights differ. Writes a grid of images (PNG) and a text file.
    """

    def __init__(
        self, trainer: RunTrainer, config: TrainConfig, model: MMInterleaved, processor: MMInterleavedProcessor
    ) -> None:
        self.trainer, self.config, self.model, self.processor = trainer, config, model, processor
        settings = config.samples
        self.documents = load_documents(str(settings.documents))[: settings.count]
        plain: Final = "dynamic"  # captured graphs would keep memory and change the memory format of trained weights
        self.settings = GenerationSettings(
            text=TextSettings(
                max_new_tokens=settings.max_new_tokens, min_new_tokens=0, num_beams=1, cache_implementation=plain
            ),
            image=ImageSettings(
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                cache_implementation=plain,
            ),
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Generate the samples of the untrained weights."""
        if state.global_step == 0:
            self.generate(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Generate samples every `sample_every` steps."""
        if state.global_step % self.config.sample_every == 0:
            self.generate(state.global_step)

    def generate(self, step: int) -> None:
        """Generate the samples of a step. The state of training and its random numbers do not change."""
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        self.model.eval()
        trainer = self.trainer
        with (
            torch.random.fork_rng(devices=devices),
            trainer.uncompiled(),
            trainer.averaged(),
            trainer.accelerator.autocast(),
        ):
            events = self.model.generate_interleaved(self.documents, self.processor, self.settings, progress=False)
            done = sorted((e for e in events if isinstance(e, DocumentFinished)), key=lambda e: e.document)
        self.model.train()
        folder = Path(self.config.output) / "samples"
        rows = [_images(e.result) for e in done]
        texts = [_text(e.result) for e in done]
        write_atomic(folder / f"{step:07}.txt", "\n\n".join(texts) + "\n")
        sheet = _sheet(rows, self.processor.target_size)
        if sheet is not None:
            write_image(folder / f"{step:07}.png", sheet)
        if self.config.tensorboard:
            board = Path(self.config.output) / "tensorboard"
            with writing(board), SummaryWriter(str(board)) as writer:
                writer.add_text("samples", "\n\n".join(texts), step)
                if sheet is not None:
                    writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")


def _images(document: Document) -> list[PIL.Image.Image]:
    return [
        load_image(cast(ImageSource, s.source))
        for s in document.segments
        if isinstance(s, Image) and s.source is not None
    ]


def _text(document: Document) -> str:
    return " ".join((s.text or "") if isinstance(s, Text) else "[image]" for s in document.segments if not s.is_open)


def _sheet(rows: list[list[PIL.Image.Image]], side: int) -> PIL.Image.Image | None:
    """One row of squares for each document."""
    width = max((len(row) for row in rows), default=0)
    if width == 0:
        return None
    blank = PIL.Image.new("RGB", (side, side), "white")
    padded = [image for row in rows for image in (*row, *[blank] * (width - len(row)))]
    return make_image_grid(padded, len(rows), width, resize=side)
