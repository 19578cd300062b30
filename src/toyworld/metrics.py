"""The toy world's own scores: what its detector sees in an image, and which facts a caption gets right."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm_interleaved.evaluation.scoring import ScoringInputs, sample_of
from mm_interleaved.metrics import MetricResult, MissingRequirement, aligned, gives, reports_missing
from mm_interleaved.metrics.image_files import ImageLike, rgb

from .detector import WEIGHTS, Detection, Detector, train_command
from .facts import drawn_scenes, shown_scenes
from .language import score_caption
from .scene import Scene
from .score import SceneScore, match
from .shifted import reading
from .stories import Frame
from .writers.base import Job

BATCH = 64  # images read at a time


@dataclass(frozen=True)
class SceneImages:
    """How well images show the scenes that were asked for: the rates of `SceneScore`, in percent.

    Of a story's frame, no relations are compared (its text states cells), but attributes that no text states must be
    kept.

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
        scores = {key: _score(asked, found) for (key, _, asked), found in zip(rows, seen, strict=True)}
        return _ratios({key: score.ratios() for key, score in scores.items()}, "found_kind_color")


def _score(asked: Scene | Frame, seen: Sequence[Detection]) -> SceneScore:
    return match(asked.scene, seen, (), asked.unsaid) if isinstance(asked, Frame) else match(asked, seen)


def _ratios(samples: Mapping[Hashable, Mapping[str, tuple[int, int]]], main: str) -> MetricResult:
    """Ratios of sums in percent, `main` first; a sample's score is 0 where it is out of nothing."""
    names = sorted(next(iter(samples.values())), key=lambda name: name != main)
    weights = {name: {key: float(sample[name][1]) for key, sample in samples.items()} for name in names}
    weights = {name: found for name, found in weights.items() if any(found.values())}
    scores = {
        name: {key: 100.0 * sample[name][0] / max(sample[name][1], 1) for key, sample in samples.items()}
        for name in weights
    }
    return MetricResult.of_means(scores, weights)


@reports_missing
def caption_facts(predictions: Mapping[Hashable, str], references: Mapping[Hashable, Scene]) -> MetricResult:
    """How well captions describe scenes.

    Values: `facts_right`, in percent of the facts stated, over all captions (left out if there are none);
    `objects_mentioned`, in percent of the objects in the scenes; `facts_per_caption`, a count.

    Raises:
        ValueError: the ids differ.
    """
    scores = {key: score_caption(text, scene) for key, text, scene in aligned(predictions, references)}
    found = _ratios(
        {key: {"facts_right": (s.right, s.stated), "objects_mentioned": (s.mentioned, s.objects)}
         for key, s in scores.items()}, "facts_right",
    )  # fmt: skip
    stated: dict[Hashable, float] = {key: float(score.stated) for key, score in scores.items()}
    return MetricResult.of_means({**found.per_sample, "facts_per_caption": stated}, found.weights)


@gives("facts_right", "objects_mentioned", "facts_per_caption", "objects_f1")
def scene_captions(given: ScoringInputs) -> MetricResult:
    """Return what captions say right of the scenes behind the images of a task."""
    scenes = shown_scenes(given.samples, given.facts)
    if _is_shifted(given):
        return shifted_captions(given.by_id("prediction"), scenes)
    return caption_facts(given.by_id("prediction"), scenes)


@gives(*SceneScore().ratios(), "found_color")
def scene_images(given: ScoringInputs) -> MetricResult:
    """Return what is found in generated images, against the scenes that a task asks for."""
    scenes = drawn_scenes(given.samples, given.facts)
    score = shifted_images if _is_shifted(given) else SceneImages(device=given.device)
    return score(given.images(), scenes).grouped(sample_of)


def _is_shifted(given: ScoringInputs) -> bool:
    return given.facts is not None and isinstance(given.facts.data, Job) and given.facts.data.world_name == "shifted"


def shifted_captions(predictions: Mapping[Any, str], references: Mapping[Any, Scene]) -> MetricResult:
    """How well texts name the objects of scenes of the shifted world: `objects_f1`, in percent.

    Raises:
        ValueError: the ids differ.
    """
    rows = aligned(predictions, references)
    return _ratios({key: reading.score_text(text, scene) for key, text, scene in rows}, "objects_f1")


def shifted_images(predictions: Mapping[Any, ImageLike], references: Mapping[Any, Scene | Frame]) -> MetricResult:
    """How well images show scenes of the shifted world: `found_kind_color` and its parts, in percent.

    Raises:
        ValueError: the ids differ.
    """
    found = {}
    for key, image, asked in aligned(predictions, references):
        scene = asked.scene if isinstance(asked, Frame) else asked
        found[key] = reading.score_image(reading.read_image(rgb(image)), scene)
    return _ratios(found, "found_kind_color")
