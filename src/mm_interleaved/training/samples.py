"""Images and texts generated from a few fixed documents during training.

The folder `samples` has for each step

STEP.json           the documents: their segments, as text or as the name of an image, whether these are generated, and
                    what the data have in the place of the last one
STEP_D_S.png        the generated image of segment S of document D
STEP.png, STEP.txt  all images in a grid, and all texts
given_D_S.png       the images that are given, once; wanted_D.png: those that the data have
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import PIL.Image
import torch
from diffusers.utils import make_image_grid
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data import SourceConfig
from ..data.augmentation import AugmentConfig, augment
from ..data.readers import make_reader
from ..data.report import Rejected
from ..document import Document, Image, Segment, Text, load_documents, place_boxes
from ..generation import MMInterleaved
from ..generation.interleaved import DocumentFinished
from ..generation.settings import GenerationSettings, ImageSettings, TextSettings
from ..io import InputError, write_atomic, write_image, write_json, writing
from ..io.images import ImageSource, load_image
from ..processor import MMInterleavedProcessor
from .config import TrainConfig
from .trainer import RunTrainer

FOLDER = "samples"
MAX_SIDE = 512  # of the saved images, in pixels


class Samples(TrainerCallback):
    """Fills the open slots of documents before the first step and every `sample_every` steps.

    Each time with the same seeds, so that only the weights differ. Writes a grid of images (PNG) and a text file. The
    first process generates; with FSDP the others give it their weights.
    """

    def __init__(
        self, trainer: RunTrainer, config: TrainConfig, model: MMInterleaved, processor: MMInterleavedProcessor
    ) -> None:
        self.trainer, self.config, self.model, self.processor = trainer, config, model, processor
        settings = config.samples
        found = sample_documents(config)
        self.documents, self.wanted = [document for document, _ in found], [wanted for _, wanted in found]
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
        """Generate the samples of the untrained weights; FSDP cannot gather them before the first step."""
        if state.global_step == 0 and not self.trainer.is_fsdp_enabled:
            self.generate(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Generate samples every `sample_every` steps."""
        if state.global_step % self.config.sample_every == 0:
            self.generate(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Generate the samples of the trained weights, if the last step was not one of the others."""
        if state.global_step >= state.max_steps and state.global_step % self.config.sample_every:
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
            trainer.whole(),
            trainer.accelerator.autocast(),
        ):
            done = self._finished() if trainer.is_world_process_zero() else []
        self.model.train()
        if not trainer.is_world_process_zero():
            return
        folder = Path(self.config.output) / FOLDER
        _save_documents([e.result for e in done], self.wanted, folder, step)
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

    def _finished(self) -> list[DocumentFinished]:
        events = self.model.generate_interleaved(self.documents, self.processor, self.settings, progress=False)
        return sorted((e for e in events if isinstance(e, DocumentFinished)), key=lambda e: e.document)


def sample_documents(config: TrainConfig) -> list[tuple[Document, Segment | None]]:
    """The documents of `samples`, with open slots, and what the data have in the slot.

    Raises:
        InputError: the file or the data cannot be read, or have no document with a part to generate.
    """
    settings = config.samples
    if settings.documents is not None:
        return [(document, None) for document in load_documents(settings.documents)[: settings.count]]
    data = config.eval_data or config.data
    readers = [iter(_records(source, Path(data.root))) for source in data.own_sources]
    found: list[tuple[Document, Segment | None]] = []
    while readers and len(found) < settings.count:  # one of each source in turn
        for reader in list(readers):
            sample = next(reader, None)
            if sample is None:
                readers.remove(reader)
            elif len(found) < settings.count:
                found.append(sample)
    if not found:
        raise InputError("samples.from_data: the data have no document with a part to generate",
                         fix="Give 'samples.documents', or set 'sample_every' to 0")  # fmt: skip
    return found


def _records(source: SourceConfig, root: Path) -> Iterator[tuple[Document, Segment]]:
    """The documents of a source, each up to its last part with a loss, which is open; and that part.

    Images become square as in training; nothing else of `augment` is done.
    """
    reader, rng = make_reader(source, root), np.random.default_rng(0)
    plain = AugmentConfig(square=source.augment.square)
    for shard in range(len(reader.shards.names)):
        for record in reader.shards.records(shard, 0, 0):
            try:
                document = reader.document(record, rng, lambda reason, example: None)
                document = augment(document, plain, rng, getattr(reader, "crop", None))
                document.segments = place_boxes(document.segments)  # also where the only boxes are in the answer
            except (Rejected, InputError):
                continue
            learned = [i for i, segment in enumerate(document.segments) if segment.supervise]
            if learned:
                last = document.segments[learned[-1]]
                slot = (
                    dataclasses.replace(last, text=None, boxes=()) if isinstance(last, Text) else Image(role=last.role)
                )
                before = document.segments[: learned[-1]]
                yield dataclasses.replace(document, segments=[*before, slot], max_turns=None), last


def _save_documents(documents: Sequence[Document], wanted: Sequence[Segment | None], folder: Path, step: int) -> None:
    """Write the images of the documents, and their segments as JSON."""
    entries = []
    for number, (document, right) in enumerate(zip(documents, wanted, strict=True)):
        segments = []
        for place, segment in enumerate(document.segments):
            prefix = "given" if segment.generated is None else f"{step:07}"
            segments += _saved(segment, folder / f"{prefix}_{number}_{place}.png")
        in_data = [] if right is None else _saved(right, folder / f"wanted_{number}.png")
        entries.append({"segments": segments, "wanted": in_data})
    write_json(folder / f"{step:07}.json", entries)


def _saved(segment: Segment, path: Path) -> list[dict[str, Any]]:
    """The segment as plain data, and its image as a file, unless it was given and is there already; []: it is open."""
    if segment.is_open:
        return []
    generated = segment.generated is not None
    if isinstance(segment, Text):
        return [{"text": segment.text, "generated": generated}]
    if generated or not path.exists():
        image = load_image(cast(ImageSource, segment.source))
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        write_image(path, image)
    return [{"image": path.name, "generated": generated}]


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
