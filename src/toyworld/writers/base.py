"""What a format of data sets is made of."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..sampling import SPLITS, Split, scene_rng
from ..scene import Scene
from ..worlds import BASE, WORLDS, World

VERSION = 1  # of the toy world's contents: another version writes other data for the same seed


@dataclass(frozen=True)
class Job:
    """What to write.

    Attributes:
        count: number of samples.
        split: whose scenes.
        seed: of everything.
        size: side of the images in pixels.
        world_name: of `worlds.WORLDS`.
    """

    count: int
    split: Split
    seed: int
    size: int
    world_name: str = BASE

    @property
    def world(self) -> World:
        """The world whose scenes are written."""
        return WORLDS[self.world_name]

    def rng(self, index: int) -> np.random.Generator:
        """The source of chance of sample number `index`, whoever writes it."""
        return scene_rng(self.seed, self.split, index)

    def number(self, index: int) -> int:
        """The id of sample number `index`: from 1000001 on, another one for another seed or split."""
        return 1_000_000 * (1 + 3 * self.seed + SPLITS.index(self.split)) + index + 1

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The scene of sample number `index`, and what to make further choices with."""
        rng = self.rng(index)
        return self.world.scene(rng, self.split), rng


@dataclass(frozen=True)
class Format:
    """A layout of files.

    To add one, write a module with a `Format` (or several related ones in `FORMATS`) and list it in `writers.FORMATS`.

    Attributes:
        name: how the command line calls it.
        description: what it is, in a line.
        write: writes samples `indices` under a folder (in a process of its own, so what it writes depends on nothing
            else) and returns whatever `finish` needs of them, plain data.
        finish: writes the files that are about all samples, given the results of `write` in order.
        batch: how many samples go into one call of `write`: a shard, for formats that have shards.
    """

    name: str
    description: str
    write: Callable[[Job, range, Path], Any]
    finish: Callable[[Job, list[Any], Path], None]
    batch: int


def nothing_more(job: Job, results: list[Any], folder: Path) -> None:
    """For formats that are complete with their shards."""


def jpeg(image: PIL.Image.Image) -> bytes:
    """As a file, with little loss: letters on objects must stay legible."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def write_image(job: Job, scene: Scene, path: Path) -> None:
    """Draw a scene into a JPEG file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(job.world.draw(scene, job.size)))


def write_json(data: Any, path: Path) -> None:
    """A file of one JSON value; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def json_lines(records: list[Any]) -> str:
    """One JSON value a line."""
    return "".join(json.dumps(record) + "\n" for record in records)
