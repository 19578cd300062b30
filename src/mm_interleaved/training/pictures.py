"""Batches of pictures for the autoencoder: scenes of the toy world, or the files of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data import leave_process_group
from ..processor.images import CROPS, load_picture
from .config import PicturesConfig

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ToyPictures(Dataset[Tensor]):
    """Scenes of the toy world, drawn when asked for: uint8 [3, side, side]."""

    def __init__(self, config: PicturesConfig, side: int) -> None:
        self.config, self.side = config, side

    def __len__(self) -> int:
        return self.config.count

    def __getitem__(self, index: int) -> Tensor:
        from ..toyworld.draw import draw  # drawing needs libraries that training on files does without
        from ..toyworld.sampling import random_scene, scene_rng

        rng = scene_rng(self.config.seed, self.config.split, index)
        return _tensor(np.array(draw(random_scene(rng, split=self.config.split), self.side)))


class FolderPictures(Dataset[Tensor]):
    """Every picture below a folder, cut square and resized: uint8 [3, side, side]."""

    def __init__(self, folder: Path, side: int) -> None:
        self.side = side
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
        if not self.files:
            raise ValueError(f"'{folder}' holds no picture ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return _tensor(CROPS["center"](load_picture(self.files[index]), self.side))


def _tensor(picture: np.ndarray) -> Tensor:
    return torch.tensor(picture).permute(2, 0, 1).contiguous()


class PictureLoader:
    """Batches uint8 [batch, 3, side, side], in an order that follows from seed and epoch; see `feed.Loader`."""

    def __init__(self, config: PicturesConfig, side: int, rank: int = 0, world_size: int = 1) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        source = config.folder
        self.dataset = ToyPictures(config, side) if source is None else FolderPictures(Path(source), side)
        self.epoch, self.served = 0, 0
        if len(self.dataset) < config.batch_size * world_size:
            raise ValueError(
                f"{len(self.dataset)} pictures are fewer than a batch of {config.batch_size} on each of {world_size} "
                "processes"
            )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = np.random.default_rng((self.config.seed, self.epoch)).permutation(len(self.dataset))
        order = order[: len(order) // self.world_size * self.world_size][self.rank :: self.world_size]
        size, workers = self.config.batch_size, self.config.num_workers
        loader = DataLoader(
            self.dataset,
            batch_size=size,
            sampler=order[self.served * size :].tolist(),
            drop_last=True,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=leave_process_group if workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.config.seed),  # leaves the global one alone
        )
        for pictures in loader:
            self.served += 1
            yield {"pictures": pictures}
        self.epoch, self.served = self.epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Start that epoch from its beginning."""
        if epoch != self.epoch:
            self.epoch, self.served = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"epoch": self.epoch, "served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.epoch, self.served = state["epoch"], state["served"]
