"""Random transforms of training documents that keep their truth: boxes and the words left and right change, too.

One draw serves a whole document, so that a label map stays aligned with its photo and boxes with their image.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import field, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from ..document import Box, Document, Segment, Text, Transform
from ..document.transform import WHOLE, Region, Square
from ..validation import Share, settings

MAX_ASPECT = 4 / 3  # a random region is at most this much wider or higher than the image, relative to its sides
# "left" and "right" as words of their own or with these endings; "bright", "rights" and "leftover" are others
_SIDE = re.compile(r"(?<![^\W_])([Ll][Ee][Ff][Tt]|[Rr][Ii][Gg][Hh][Tt])"
                   r"(?=(?:most|wards?|hand|side|MOST|WARDS?|HAND|SIDE)?(?![^\W_]))")  # fmt: skip


@settings
class CropConfig:
    """A random region of the images, which contains all boxes of the document, is used in place of whole images.

    Attributes:
        scale: least and greatest share of an image's area.
        prob: probability that it is done.
    """

    scale: Annotated[list[Share], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0.5, 1.0])
    prob: Share = 1.0

    def __post_init__(self) -> None:
        least, most = self.scale
        if not 0 < least <= most:
            raise ValueError(f"scale must be two shares of the area, the smaller one first, not {self.scale}")


@settings
class AugmentConfig:
    """How the images of training documents are changed. The same draw serves all images and boxes of a document.

    Attributes:
        square: how images become square: `center` cuts the central square out, `squash` stretches. Documents with boxes
            need `squash`. None: as the task of the source needs it, otherwise as the model's processor does it, and
            `squash` for images with boxes.
        flip: probability that left and right are swapped, in images, boxes, and the words "left" and "right". Leave it
            at 0 where images hold writing, or where "left" and "right" have other meanings in the texts.
        crop: a random region in place of whole images; None: never.
    """

    square: Square | None = None
    flip: Share = 0.0
    crop: CropConfig | None = None


def augment(
    document: Document, config: AugmentConfig, rng: np.random.Generator, square: Square | None = None
) -> Document:
    """The document with a random transform of its images.

    Args:
        document: a training document.
        config: what is drawn, and how often.
        rng: the random numbers of this document in this epoch.
        square: how the source's images become square if `config` does not say; None: the processor decides.
    """
    region = WHOLE
    if config.crop is not None and rng.random() < config.crop.prob:
        region = random_region(config.crop.scale, boxes_of(document.segments), rng)
    flip = config.flip > 0 and bool(rng.random() < config.flip)
    return apply(document, Transform(config.square or square, region, flip))


def apply(document: Document, transform: Transform) -> Document:
    """The document with the transform added to each of its images, and with boxes and words that fit to them."""
    if transform == Transform():
        return document

    def changed(segment: Segment) -> Segment:
        if isinstance(segment, Text):
            moved = segment.move_boxes(lambda box: moved_box(box, transform))
            return swap_sides(moved) if transform.flip else moved
        return replace(segment, transform=(segment.transform or Transform()).then(transform))

    return replace(document, segments=[changed(segment) for segment in document.segments])


def moved_box(box: Box, transform: Transform) -> Box:
    """The box after the transform."""
    x1, y1, x2, y2 = transform.move(box.sides)
    return replace(box, x1=x1, y1=y1, x2=x2, y2=y2)


def boxes_of(segments: Sequence[Segment]) -> list[Box]:
    """The boxes that the texts state."""
    return [box for segment in segments if isinstance(segment, Text) for _, box in segment.boxes]


def random_region(scale: Sequence[float], boxes: Sequence[Box], rng: np.random.Generator) -> Region:
    """A random region that contains all boxes.

    Its area and its aspect ratio relative to the image's are drawn as for random resized crops (Szegedy et al. 2015,
    arXiv 1409.4842); it is enlarged as far as the boxes need it, and its place is uniform.

    Args:
        scale: least and greatest share of the image's area.
        boxes: the boxes.
        rng: random numbers.
    """
    area = rng.uniform(scale[0], scale[1])
    aspect = math.exp(rng.uniform(-math.log(MAX_ASPECT), math.log(MAX_ASPECT)))
    width = _span(math.sqrt(area * aspect), [(box.x1, box.x2) for box in boxes], rng)
    height = _span(math.sqrt(area / aspect), [(box.y1, box.y2) for box in boxes], rng)
    return width[0], height[0], width[1], height[1]


def _span(length: float, inside: Sequence[tuple[float, float]], rng: np.random.Generator) -> tuple[float, float]:
    """A random span of about `length` in [0, 1] that contains others."""
    first, last = min((a for a, _ in inside), default=1.0), max((b for _, b in inside), default=0.0)
    length = min(max(length, last - first), 1.0)
    lowest, highest = max(last - length, 0.0), min(first, 1.0 - length)
    start = rng.uniform(lowest, highest) if lowest < highest else min(lowest, highest)
    return start, min(max(start + length, last), 1.0)


def swap_sides(text: Text) -> Text:
    """The text with "left" and "right" swapped, also in words such as "leftmost"; boxes keep their content.

    Lower case, upper case and initial capitals are kept; other mixtures become lower case.
    """
    words, start, swapped, boxes = text.text or "", 0, "", []
    for place, box in [*text.boxes, (len(words), None)]:
        swapped += _SIDE.sub(_other_side, words[start:place])
        start = place
        if box is not None:
            boxes.append((len(swapped), box))
    return text if text.is_open else replace(text, text=swapped, boxes=tuple(boxes))


def _other_side(found: re.Match[str]) -> str:
    word = found[0]
    other = "right" if word.lower() == "left" else "left"
    return other.upper() if word.isupper() else other.title() if word.istitle() else other
