"""One optimizer step on eight documents, however they are divided; as a script, for several processes.

The arguments: a file for the weights after the step, the documents (a name in `KINDS`), the rows of a batch, and
settings of the run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from rich.console import Console
from safetensors.torch import save_file

from mm_interleaved import MMInterleaved, MMInterleavedProcessor
from mm_interleaved.configuration import load_config
from mm_interleaved.document import Document, Image, Text
from mm_interleaved.model.image_decoder import NoiseSamples
from mm_interleaved.pretrained import load
from mm_interleaved.processor import Batch
from mm_interleaved.training.arguments import training_arguments
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.pipeline import BatchPipeline, prepare_documents
from mm_interleaved.training.run import branches_of, destroy_process_group
from mm_interleaved.training.sharding import ShardingCallback
from mm_interleaved.training.trainer import RunTrainer

from ..conftest import awaken
from .conftest import ROOT, arguments
from .stand_in import COLORS, shard_on_cpu


def image(number: int, supervise: bool = True) -> Image:
    return Image(PIL.Image.new("RGB", (40, 40), COLORS[number]), supervise=supervise)


def question(number: int, words: str) -> Document:
    return Document([image(number, supervise=False), Text("What is it?", supervise=False), Text(words)])


def text(words: str) -> Document:
    return Document([Text(words)])


DRAWING = Document([Text("Draw it in red."), image(0)])
STORY = Document([Text("First"), image(1), Text("and then, a little later,"), image(2)])
ALONE = Document([image(3)])  # an image without a context has no loss
SILENT = [Document([Text("Draw it.", supervise=False), image(number)]) for number in range(4)]
KINDS = {
    "texts": [text("Words."), text("More of them.")],
    "unequal": [STORY, text("Words."), question(4, "Blue."), DRAWING, text("Some more words here."), text("a"),
                question(5, "It is a long answer, of many words."), ALONE],
    "one without images": [STORY, DRAWING, question(4, "Blue."), STORY, text("Words."), text("a"), text("b c"),
                           text("Some more words here.")],
    "one without an image loss": [STORY, DRAWING, text("Words."), STORY, question(4, "Blue."), question(5, "Red."),
                                  question(6, "a"), question(7, "No idea.")],
    "one without text": [STORY, text("Words."), question(4, "Blue."), DRAWING, *SILENT],
}  # fmt: skip


class Given:
    """Batches of the documents, dealt out to ranks in turn, with noise for each document."""

    def __init__(self, documents: list[Document], processor: MMInterleavedProcessor, rows: int, rank: int, ranks: int):
        batches = [documents[i : i + rows] for i in range(0, len(documents), rows)]
        self.mine, self.processor = batches[rank::ranks], processor

    def __iter__(self) -> Iterator[Batch]:
        for documents in self.mine:
            batch = self.processor(documents, training=True)
            for row, document in enumerate(documents):
                if document in SILENT:
                    batch["labels"][row] = -100  # neither the begin-of-image token nor `</s>`
            yield batch

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_states(self, states: Sequence[dict[str, Any]]) -> int:
        return 0

    def take_seconds(self) -> dict[str, float]:
        return {}


def same_noise(model: MMInterleaved, config: TrainConfig) -> Any:
    """`prepare_documents`, with noise that follows from an image and not from the number of its batch."""
    prepare = prepare_documents(model, config.losses, config.shapes)

    def prepared(batch: Batch, seed: int, device: torch.device) -> dict[str, Any]:
        inputs = prepare(batch, seed, device)
        noise = []
        for number in inputs["layout"].target_images.tolist():
            own = torch.Generator().manual_seed(int(batch.pixel_values[number].sum() * 1000))
            noise.append(model.image_decoder.sample_noise(1, own))
        names = [f.name for f in fields(NoiseSamples)]
        joined = {n: torch.cat([getattr(sample, n) for sample in noise]) for n in names} if noise else {}
        return inputs | {"noise_samples": NoiseSamples(**joined) if joined else None}

    return prepared


def pipeline_of(
    kind: str, rows: int, model: MMInterleaved, config: TrainConfig, rank: int = 0, ranks: int = 1
) -> BatchPipeline:
    """Batches of the documents for one of several processes."""
    loader = Given(KINDS[kind], load("debug").processor, rows, rank, ranks)
    return BatchPipeline(loader, same_noise(model, config), 0, torch.device("cpu"), rank, ranks)


def step(kind: str, rows: int, settings: list[str], folder: Path) -> tuple[MMInterleaved, RunTrainer]:
    """The model after one step, in this process or as one of several, and its trainer."""
    given = arguments(folder, "steps=1", "log_every=1", "save_every=0", "precision=float32", "optimizer.eps=1.0",
                      "optimizer.lr=1.0", "optimizer.max_grad_norm=0", "schedule.kind=constant",
                      "schedule.warmup_steps=0")  # fmt: skip
    config = load_config(ROOT / "configs/debug.yaml", TrainConfig, [*given, *settings])
    args = training_arguments(config, "cpu")
    args.max_steps = 1
    torch.manual_seed(0)
    model = load("debug").model.train()
    awaken(model)
    if "frozen" in config.model.overrides:
        model.config.frozen = config.model.overrides["frozen"]
        model.freeze()
    pipeline = pipeline_of(kind, rows, model, config, args.process_index, args.world_size)
    branches = branches_of(config) if config.fsdp else None
    counted = config.losses.scale == "global"
    trainer = RunTrainer(model, args, config, pipeline, branches=branches, counted=counted)
    if config.fsdp:
        trainer.add_callback(ShardingCallback(Console(quiet=True)))
    trainer.start_window()
    trainer.train()
    return model, trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    output, kind_, rows_, *others = sys.argv[1:]
    if "--shard" in others:
        others.remove("--shard")
        shard_on_cpu()
    model_, trainer_ = step(kind_, int(rows_), others, Path(output).parent / "run")
    state = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model_.named_parameters()}
    if trainer_.args.process_index == 0:
        save_file({name: p.detach().clone() for name, p in state.items() if p.requires_grad}, output)
    destroy_process_group()
