"""A loader of a few documents, dealt out to ranks in turn; as a script, a short run on it, for torchrun."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from mm_interleaved import MMInterleavedProcessor
from mm_interleaved.configuration import load_config
from mm_interleaved.document import Document, Image, Text
from mm_interleaved.pretrained import FOLDER
from mm_interleaved.processor import Batch
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.run import train

ROOT = Path(__file__).parents[2]
COLORS = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange"]


class Colors:
    """Batch n of an epoch holds one document about colour n; rank r of w gets batches r, r + w, ..."""

    def __init__(self, data: Any, processor: MMInterleavedProcessor, *, rank: int, world_size: int) -> None:
        self.processor, self.rank, self.world_size = processor, rank, world_size
        self.epoch, self.place = 0, 0

    def __iter__(self) -> Iterator[Batch]:
        mine = COLORS[self.rank :: self.world_size]
        while self.place < len(mine):
            name = mine[self.place]
            self.place += 1
            picture = PIL.Image.new("RGB", (40, 40), name)
            document = Document([Text(f"This is {name}."), Image(picture), Text("And again."), Image(picture)])
            yield self.processor(document, training=True)
        self.place = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = load_config(ROOT / "configs/debug.yaml", TrainConfig, sys.argv[1:])
    train(settings, FOLDER / "tokenizer", "cpu", Colors)
