"""`Transform`: which part of an image is used, whether it is mirrored, and how it becomes square."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..io import InputError

Square = Literal["center", "squash"]
Region = tuple[float, float, float, float]
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Transform:
    """How an upright image is changed before the model sees it: first cut, then mirrored, then made square.

    Attributes:
        square: "center" cuts the central square out, "squash" stretches; None: the processor's setting decides.
        region: the part that is kept, (x1, y1, x2, y2) in shares of the image's width and height.
        flip: whether left and right are swapped.

    Raises:
        InputError: the region is empty or outside the image.
    """

    square: Square | None = None
    region: Region = WHOLE
    flip: bool = False

    def __post_init__(self) -> None:
        x1, y1, x2, y2 = self.region
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
            raise InputError(f"{self.region} is no part of an image", fix="Give shares x1 < x2 and y1 < y2 from 0 to 1")

    def then(self, other: Transform) -> Transform:
        """This transform followed by another one, whose region refers to the image after this one."""
        x1, y1, x2, y2 = other.region
        if self.flip:
            x1, x2 = 1 - x2, 1 - x1
        left, top, right, bottom = self.region
        width, height = right - left, bottom - top
        region = (left + x1 * width, top + y1 * height, min(left + x2 * width, 1.0), min(top + y2 * height, 1.0))
        kept = self.region if other.region == WHOLE else region
        return replace(self, square=other.square or self.square, region=kept, flip=self.flip != other.flip)

    def move(self, sides: Region) -> Region:
        """The sides of a box after the transform, in shares of the new width and height, cut at the borders.

        Making the image square by "center" is not included: where its borders are depends on the image's size.
        """
        left, top, right, bottom = self.region
        x1, x2 = (min(max((x - left) / (right - left), 0.0), 1.0) for x in (sides[0], sides[2]))
        y1, y2 = (min(max((y - top) / (bottom - top), 0.0), 1.0) for y in (sides[1], sides[3]))
        return (1 - x2, y1, 1 - x1, y2) if self.flip else (x1, y1, x2, y2)
