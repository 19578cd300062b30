"""Batches of single scenes, as layers, for what learns from images alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..sampling import Split, random_scene, scene_rng
from .layers import Atlas, LayeredImages


@dataclass
class SceneBatch:
    """Images to be composed."""

    pictures: LayeredImages


class ToyScenes(IterableDataset[SceneBatch]):
    """Batches without end; the n-th scene of a worker follows from the seed alone.

    Args:
        count: scenes of a batch.
        atlas: what images are composed of.
        seed: of the scenes.
        split: that they are from.
    """

    def __init__(self, count: int, atlas: Atlas, seed: int, split: Split = "train") -> None:
        self.count, self.atlas, self.seed = count, atlas, seed
        self.split: Split = split

    def __iter__(self) -> Iterator[SceneBatch]:
        info = get_worker_info()
        index, step = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None:
            torch.set_num_threads(1)
        while True:
            images = []
            for _ in range(self.count):
                scene = random_scene(scene_rng(self.seed, self.split, index), split=self.split)
                images.append(self.atlas.image(scene))
                index += step
            yield SceneBatch(LayeredImages.join(images))
