"""A loader of a few documents, dealt out to ranks in turn; as a script, a short run on it, for torchrun.

`--mixed` takes documents of several kinds; with `--hang` a process gets no third batch; with `--shard`, FSDP shards on
a CPU; `--gpu` takes GPUs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from mm_interleaved import MMInterleavedProcessor
from mm_interleaved.configuration import load_config
from mm_interleaved.document import Document, Image, Text
from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.processor import Batch
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.run import destroy_process_group, train

ROOT = Path(__file__).parents[2]
COLORS = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange"]


class Colors:
    """Batch n of an epoch holds one document about colour n; rank r of w gets batches r, r + w, ..."""

    def __init__(self, data: Any, processor: MMInterleavedProcessor, *, rank: int, world_size: int) -> None:
        self.processor, self.rank, self.world_size = processor, rank, world_size
        self.epoch, self.place = 0, 0

    def __iter__(self) -> Iterator[Batch]:
        mine = range(len(COLORS))[self.rank :: self.world_size]
        while self.place < len(mine):
            number = mine[self.place]
            self.place += 1
            yield self.batch(number, PIL.Image.new("RGB", (40, 40), COLORS[number]))
        self.place = 0

    def batch(self, number: int, image: PIL.Image.Image) -> Batch:
        """The batch about a colour."""
        document = Document([Text(f"This is {COLORS[number]}."), Image(image), Text("And again."), Image(image)])
        return self.processor(document, training=True)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def take_seconds(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place, "epoch": self.epoch}

    def load_states(self, states: Sequence[dict[str, int]]) -> int:
        self.place = sum(state["place"] for state in states) // self.world_size
        self.epoch = states[0]["epoch"]
        return self.epoch


class Mixed(Colors):
    """In turn two images, none at all, and one without anything before it, whose text is not learned."""

    def batch(self, number: int, image: PIL.Image.Image) -> Batch:
        """The batch about a colour."""
        text = Text(f"This is {COLORS[number]}.")
        kinds = [[text, Image(image), text, Image(image)], [text], [Image(image), text]]
        batch = self.processor(Document(kinds[number % 3]), training=True)
        if number % 3 == 2:
            batch["loss_text_weight"] = 0.0
        return batch


class Hanging(Colors):
    """The third batch of the second process never comes."""

    def batch(self, number: int, image: PIL.Image.Image) -> Batch:
        """The batch about a colour."""
        if (self.rank, self.place) == (1, 3):
            time.sleep(600)
        return super().batch(number, image)


LOADERS = {"--mixed": Mixed, "--hang": Hanging}


def shard_on_cpu() -> None:
    """Let accelerate take FSDP on a CPU, where it silently takes DDP. For tests only: it replaces a method of its."""
    make = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.fsdp_plugin = fsdp_plugin or self.fsdp_plugin
        if self.fsdp_plugin is not None:  # each time, for it is set back to the kind of the process
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    options = {a for a in arguments if a.startswith("--")}
    if "--shard" in options:
        shard_on_cpu()
    settings = load_config(ROOT / "configs/debug.yaml", TrainConfig, [a for a in arguments if a not in options])
    device = None if "--gpu" in options else "cpu"
    loader = next((LOADERS[option] for option in options if option in LOADERS), Colors)
    train(settings, TOKENIZER, device, loader)
    destroy_process_group()
