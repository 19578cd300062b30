"""The worlds that data sets are written of: what they draw and say about their scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from . import draw, language, sampling, stories
from .language import Caption, Dialogue, Question, Referring
from .sampling import Split
from .scene import Scene
from .shifted import drawing as shifted_drawing
from .shifted import language as shifted_language
from .shifted import stories as shifted_stories
from .shifted import world as shifted_world
from .stories import Story


@dataclass(frozen=True)
class World:
    """What writers need of a world.

    Attributes:
        scene: a random scene of a split.
        draw: the image of a scene at a size; `label_map` what is seen at each of its pixels; `boxes` where objects are.
        caption, questions, referring, dialogue: what is said about a scene; `questions` also gets their number.
        story: a story of a number of frames, of a split.
        formats: the formats it is written in; None: all.
    """

    scene: Callable[[np.random.Generator, Split], Scene]
    draw: Callable[[Scene, int], PIL.Image.Image]
    label_map: Callable[[Scene, int], np.ndarray]
    boxes: Callable[[Scene, int], list[tuple[int, int, int, int]]]
    caption: Callable[[Scene, np.random.Generator], Caption]
    questions: Callable[[Scene, np.random.Generator, int], list[Question]]
    referring: Callable[[Scene, np.random.Generator], Referring]
    dialogue: Callable[[Scene, np.random.Generator], Dialogue]
    story: Callable[[np.random.Generator, int, Split], Story]
    formats: Sequence[str] | None = None


def _base_scene(rng: np.random.Generator, split: Split) -> Scene:
    return sampling.random_scene(rng, split=split)


def _base_story(rng: np.random.Generator, frames: int, split: Split) -> Story:
    return stories.story(rng, frames=(frames, frames), split=split)


BASE = "base"
WORLDS: dict[str, World] = {
    BASE: World(_base_scene, draw.draw, draw.label_map, draw.boxes, language.caption, language.questions,
                language.referring, language.dialogue, _base_story),
    "shifted": World(
        shifted_world.random_scene, shifted_drawing.draw, shifted_drawing.label_map, shifted_drawing.boxes,
        shifted_language.caption, shifted_language.questions, shifted_language.referring, shifted_language.dialogue,
        shifted_stories.story, ("coco", "vqav2", "refcoco", "ade20k", "vist", "visdial"),
    ),
}  # fmt: skip


def world_of(about: dict[str, Any]) -> str:
    """The world that a file about written data names; the first one in files that name none."""
    return str(about.get("world", BASE))
