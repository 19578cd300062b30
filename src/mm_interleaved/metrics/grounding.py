"""Accuracy of boxes in text at an IoU of 0.5, as for RefCOCO."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping

from .result import MetricResult, Scores, aligned, reports_missing

SCALE = 999  # coordinates in text are in 1/999 of the image's width and height
THRESHOLD = 0.5
Box = tuple[float, float, float, float]
NOWHERE: Box = (0.0, 0.0, 0.0, 0.0)
_BOX = re.compile(r"\(([^(),]*),([^(),]*)\)\(([^(),]*),([^(),]*)\)")


def parse_box(text: str) -> Box:
    """The first "(x1,y1)(x2,y2)" in a text, in 1/999 of the image; (0, 0, 0, 0) if there is none."""
    found = _BOX.search(text)
    return NOWHERE if found is None else _numbers(found)


def parse_boxes(text: str) -> list[Box]:
    """All "(x1,y1)(x2,y2)" in a text, in 1/999 of the image."""
    return [box for found in _BOX.finditer(text) if (box := _numbers(found)) != NOWHERE]


def _numbers(found: re.Match[str]) -> Box:
    try:
        x1, y1, x2, y2 = (float(part) for part in found.groups())
    except ValueError:
        return NOWHERE
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else NOWHERE


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2), in [0, 1]; 0 if either has no area.

    Scaling both boxes along an axis does not change it, so boxes in 1/999 of an image can be used directly.
    """
    areas = [max(x2 - x1, 0.0) * max(y2 - y1, 0.0) for x1, y1, x2, y2 in (a, b)]
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    return shared / (sum(areas) - shared) if all(areas) else 0.0


@reports_missing
def grounding_accuracy(predictions: Mapping[Hashable, str], references: Mapping[Hashable, Box]) -> MetricResult:
    """Score generated boxes (text by id) against boxes in 1/999 of the image, as in training texts.

    Values: `accuracy`, percent of samples with an IoU of at least 0.5, `mean_iou` in percent, and `unparsed`, percent
    of texts without a box.

    Raises:
        ValueError: the ids differ, or a reference has no area.
    """
    overlaps: Scores = {}
    unparsed: Scores = {}
    for key, text, box in aligned(predictions, references):
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"sample {key!r}: the reference's box {box} has no area; it must be x1, y1, x2, y2")
        predicted = parse_box(text)
        overlaps[key] = 100 * iou(predicted, box)
        unparsed[key] = 100.0 * (predicted == NOWHERE)
    hits = {key: 100.0 * (overlap >= 100 * THRESHOLD) for key, overlap in overlaps.items()}
    return MetricResult.of_means({"accuracy": hits, "mean_iou": overlaps, "unparsed": unparsed})
