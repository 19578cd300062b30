"""The toy world's own scores: what its reader sees in a picture, and which facts a caption gets right."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..toyworld.language import score_caption
from ..toyworld.reader import WEIGHTS, Reader, train_command
from ..toyworld.scene import Scene
from ..toyworld.score import SceneScore, match
from .pictures import Picture, rgb
from .result import MetricResult, MissingRequirement, aligned, reports_missing

BATCH = 64  # pictures read at a time


@dataclass(frozen=True)
class ScenePictures:
    """How well pictures show the scenes that were asked for: the rates of `SceneScore`, in percent.

    The samples' scores are the percent of things found with their kind and colour.

    Attributes:
        weights: of the reader.
        device: where it runs.
    """

    weights: Path = WEIGHTS
    device: torch.device | str = "cpu"

    @reports_missing
    def __call__(self, predictions: Mapping[Hashable, Picture], references: Mapping[Hashable, Scene]) -> MetricResult:
        """Read the pictures and compare with the scenes.

        Raises:
            ValueError: the ids differ.
        """
        rows = aligned(predictions, references)
        if not self.weights.is_file():
            raise MissingRequirement(f"{self.weights}: no reader's weights", f"run: {train_command(self.weights)}")
        reader = Reader.load(self.weights, self.device)
        seen = []
        for start in range(0, len(rows), BATCH):
            seen += reader.read([rgb(picture) for _, picture, _ in rows[start : start + BATCH]])
        scores = [match(scene, found) for (_, _, scene), found in zip(rows, seen, strict=True)]
        values = {name: 100 * rate for name, rate in sum(scores, SceneScore()).rates().items()}
        return MetricResult(values, [100 * score.found_kind_color / max(score.requested, 1) for score in scores])


@reports_missing
def scene_captions(predictions: Mapping[Hashable, str], references: Mapping[Hashable, Scene]) -> MetricResult:
    """How well captions describe scenes.

    Values in percent: `facts_right`, of the facts stated, over all captions; `things_mentioned`, of the things in the
    scenes. `facts_per_caption` is a count. The samples' scores are the percent of facts right, 0 if none is stated.

    Raises:
        ValueError: the ids differ.
    """
    scores = [score_caption(text, scene) for _, text, scene in aligned(predictions, references)]
    stated, right = sum(score.stated for score in scores), sum(score.right for score in scores)
    things = sum(score.things for score in scores)
    values = {
        "facts_right": 100 * right / stated if stated else 0.0,
        "things_mentioned": 100 * sum(score.mentioned for score in scores) / things if things else 0.0,
        "facts_per_caption": stated / len(scores),
    }
    return MetricResult(values, [100 * score.right / score.stated if score.stated else 0.0 for score in scores])
