"""The toy world's own scores: what its detector sees in an image, and which facts a caption gets right."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from toyworld.detector import WEIGHTS, Detection, Detector, train_command
from toyworld.language import score_caption
from toyworld.scene import Scene
from toyworld.score import SceneScore, match
from toyworld.stories import Frame

from .image_files import ImageLike, rgb
from .result import MetricResult, MissingRequirement, aligned, reports_missing

BATCH = 64  # images read at a time


@dataclass(frozen=True)
class SceneImages:
    """How well images show the scenes that were asked for: the rates of `SceneScore`, in percent.

    Of a story's frame, no relations are asked for (its text tells cells), but looks must be kept that no text tells.
    The images' scores are the percent of objects found with their kind and colour.

    Attributes:
        weights: of the detector.
        device: where it runs.
    """

    weights: Path = WEIGHTS
    device: torch.device | str = "cpu"

    @reports_missing
    def __call__(self, predictions: Mapping[Hashable, ImageLike],
                 references: Mapping[Hashable, Scene | Frame]) -> MetricResult:  # fmt: skip
        """Read the images and compare with the scenes.

        Raises:
            ValueError: the ids differ.
        """
        rows = aligned(predictions, references)
        if not self.weights.is_file():
            raise MissingRequirement(f"{self.weights}: no detector's weights", f"run: {train_command(self.weights)}")
        detector = Detector.load(self.weights, self.device)
        seen = []
        for start in range(0, len(rows), BATCH):
            seen += detector.detect([rgb(image) for _, image, _ in rows[start : start + BATCH]])
        scores = [_score(asked, found) for (_, _, asked), found in zip(rows, seen, strict=True)]
        return _summed([score.ratios() for score in scores], "found_kind_color")


def _score(asked: Scene | Frame, seen: Sequence[Detection]) -> SceneScore:
    return match(asked.scene, seen, (), asked.unsaid) if isinstance(asked, Frame) else match(asked, seen)


def _summed(samples: Sequence[Mapping[str, tuple[int, int]]], main: str) -> MetricResult:
    """Ratios of sums in percent; `main` tells which is the samples' score, 0 where it is out of nothing."""
    ratios = {name: [(100.0 * sample[name][0], float(sample[name][1])) for sample in samples] for name in samples[0]}
    ratios = {name: parts for name, parts in ratios.items() if any(below for _, below in parts)}
    values = {name: sum(a for a, _ in parts) / sum(b for _, b in parts) for name, parts in ratios.items()}
    scores = [100.0 * sample[main][0] / max(sample[main][1], 1) for sample in samples]
    return MetricResult(values, scores, ratios=ratios)


@reports_missing
def scene_captions(predictions: Mapping[Hashable, str], references: Mapping[Hashable, Scene]) -> MetricResult:
    """How well captions describe scenes.

    Values in percent: `facts_right`, of the facts stated, over all captions (left out if there are none);
    `objects_mentioned`, of the objects in the scenes. `facts_per_caption` is a count. The samples' scores are the
    percent of facts right, 0 if none is stated.

    Raises:
        ValueError: the ids differ.
    """
    scores = [score_caption(text, scene) for _, text, scene in aligned(predictions, references)]
    result = _summed(
        [{"facts_right": (s.right, s.stated), "objects_mentioned": (s.mentioned, s.objects)} for s in scores],
        "facts_right",
    )
    result.values["facts_per_caption"] = sum(score.stated for score in scores) / len(scores)
    return result
