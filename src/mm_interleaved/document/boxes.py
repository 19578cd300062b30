"""Boxes in images. Texts state them in thousandths (docs/data_formats.md, "Boxes and regions")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..io import InputError

SCALE = 999
ROUNDING = 1e-9  # so that a side that was mirrored twice has the same text
WIDTH = len("(000,000)(000,000)")  # characters of a box in a text
TOLERANCE = 1.0  # pixels by which annotations may exceed the image, since some round up or count from 1


@dataclass(frozen=True)
class Box:
    """A box in an image.

    Attributes:
        x1, y1, x2, y2: left, upper, right and lower side, as shares of the image's width and height.
        image: number of the image among the images of its document, from 0.

    Raises:
        InputError: x1 > x2 or y1 > y2, a side is outside the image, or the number of the image is negative.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    image: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.x1 <= self.x2 <= 1 and 0 <= self.y1 <= self.y2 <= 1):  # also refuses NaN
            raise InputError(f"{list(self.sides)} is no box", fix="Write [x1, y1, x2, y2] as shares of the image's "
                             "sides from 0 to 1, with x1 <= x2 and y1 <= y2")  # fmt: skip
        if self.image < 0:
            raise InputError(f"a box is in image {self.image}", fix="Images are numbered from 0")

    @classmethod
    def from_pixels(cls, sides: Sequence[float], size: tuple[int, int], image: int = 0) -> Box:
        """The box with these sides in pixels; up to one pixel outside the image is cut off.

        Args:
            sides: x1, y1, x2, y2.
            size: width and height of the image in pixels.
            image: number of the image in its document.

        Raises:
            InputError: the sides are not in order, or a side is outside the image.
        """
        width, height = size
        if not (sides[0] <= sides[2] and sides[1] <= sides[3]):  # also refuses NaN
            raise InputError(f"{list(sides)} is no box", fix="Write [x1, y1, x2, y2] in pixels of the image, with "
                             "x1 <= x2 and y1 <= y2")  # fmt: skip
        if any(side < -TOLERANCE or side > size[i % 2] + TOLERANCE for i, side in enumerate(sides)):
            raise InputError(f"the box {list(sides)} is outside the image of {width} x {height} pixels",
                             fix="Write [x1, y1, x2, y2] in pixels of that image")  # fmt: skip
        x1, y1, x2, y2 = (min(max(side / size[i % 2], 0.0), 1.0) for i, side in enumerate(sides))
        return cls(x1, y1, x2, y2, image)

    def check_area(self) -> None:
        """Check that the box can be learned.

        Raises:
            InputError: it has no width or no height.
        """
        if self.x1 == self.x2 or self.y1 == self.y2:
            raise InputError(f"the box {list(self.sides)} has no area", fix="Leave it out, or correct it")

    @property
    def sides(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2."""
        return self.x1, self.y1, self.x2, self.y2

    def __str__(self) -> str:
        """The text of the box, such as "(012,045)(678,999)": thousandths, rounded down."""
        x1, y1, x2, y2 = (int(side * SCALE + ROUNDING) for side in self.sides)
        return f"({x1:03d},{y1:03d})({x2:03d},{y2:03d})"
