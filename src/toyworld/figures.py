"""Shapes that no font has to bring: geometric figures, worn parts, glyph plates and textures, anti-aliased.

Everything is drawn `OVERSAMPLE` times too large with PIL and reduced. Coordinates are fractions of the square that a
shape is drawn into, (x, y) from its top left corner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFont

OVERSAMPLE = 4
Point = tuple[float, float]
Paint = str | int | tuple[int, ...]


class Pen:
    """Draws fractions of a square of `pixels` a side."""

    def __init__(self, mode: str, pixels: int, height: float = 1.0) -> None:
        self.pixels, self.scale = pixels, pixels * OVERSAMPLE
        self.out_height = max(1, round(pixels * height))
        self.image = Image.new(mode, (self.scale, self.out_height * OVERSAMPLE))
        self.draw = ImageDraw.Draw(self.image)

    def polygon(self, points: Sequence[Point], paint: Paint) -> None:
        """A filled polygon."""
        self.draw.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=paint)

    def disc(self, x: float, y: float, radius: float, paint: Paint, radius_y: float | None = None) -> None:
        """A filled circle or ellipse."""
        ry = radius if radius_y is None else radius_y
        box = [(x - radius) * self.scale, (y - ry) * self.scale, (x + radius) * self.scale, (y + ry) * self.scale]
        self.draw.ellipse(box, fill=paint)

    def box(self, x0: float, y0: float, x1: float, y1: float, paint: Paint, round_by: float = 0.0) -> None:
        """A filled rectangle, its corners rounded."""
        corners = [v * self.scale for v in (x0, y0, x1, y1)]
        self.draw.rounded_rectangle(corners, round_by * self.scale, fill=paint)

    def finish(self) -> Image.Image:
        """The shape at its own size."""
        return self.image.resize((self.pixels, self.out_height), Image.Resampling.LANCZOS)


def _around(corners: int, radius: float, inner: float | None = None) -> list[Point]:
    """Corners of a regular polygon, one at the top; a star if every other one is `inner` from the middle."""
    number = corners if inner is None else 2 * corners
    radii = [radius if inner is None or i % 2 == 0 else inner for i in range(number)]
    return [(0.5 + r * sin(2 * pi * i / number), 0.5 - r * cos(2 * pi * i / number)) for i, r in enumerate(radii)]


def _circle(pen: Pen) -> None:
    pen.disc(0.5, 0.5, 0.5, 255)


def _square(pen: Pen) -> None:
    pen.box(0.04, 0.04, 0.96, 0.96, 255, 0.06)


def _triangle(pen: Pen) -> None:
    pen.polygon([(0.5, 0.03), (1.0, 0.95), (0.0, 0.95)], 255)


def _star(pen: Pen) -> None:
    pen.polygon([(x, y + 0.03) for x, y in _around(5, 0.52, 0.23)], 255)


def _heart(pen: Pen) -> None:
    turns = [2 * pi * i / 120 for i in range(120)]
    x = [0.5 + 0.5 * sin(t) ** 3 for t in turns]
    y = [0.46 - (13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 33 for t in turns]
    pen.polygon(list(zip(x, y, strict=True)), 255)


def _diamond(pen: Pen) -> None:
    pen.polygon([(0.5, 0.0), (0.88, 0.5), (0.5, 1.0), (0.12, 0.5)], 255)


def _cross(pen: Pen) -> None:
    pen.box(0.34, 0.02, 0.66, 0.98, 255, 0.05)
    pen.box(0.02, 0.34, 0.98, 0.66, 255, 0.05)


def _moon(pen: Pen) -> None:
    pen.disc(0.52, 0.5, 0.5, 255)
    pen.disc(0.76, 0.4, 0.4, 0)


def _ring(pen: Pen) -> None:
    pen.disc(0.5, 0.5, 0.5, 255)
    pen.disc(0.5, 0.5, 0.36, 0)


def _frame(pen: Pen) -> None:
    pen.box(0.02, 0.02, 0.98, 0.98, 255, 0.04)
    pen.box(0.16, 0.16, 0.84, 0.84, 0)


def _gear(pen: Pen) -> None:
    for i in range(8):
        angle = 2 * pi * (i + 0.5) / 8
        x, y, across = sin(angle), -cos(angle), (cos(angle), sin(angle))
        tooth = [(0.3, -0.13), (0.51, -0.09), (0.51, 0.09), (0.3, 0.13)]
        pen.polygon([(0.5 + r * x + w * across[0], 0.5 + r * y + w * across[1]) for r, w in tooth], 255)
    pen.disc(0.5, 0.5, 0.43, 255)
    pen.disc(0.5, 0.5, 0.32, 0)


FIGURES: dict[str, Callable[[Pen], None]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "heart": _heart, "diamond": _diamond,
    "cross": _cross, "moon": _moon, "ring": _ring, "frame": _frame, "gear": _gear,
}  # fmt: skip


def figure(name: str, pixels: int) -> Image.Image:
    """A figure as RGBA, gray, lit from the upper left."""
    pen = Pen("L", pixels)
    FIGURES[name](pen)
    alpha = pen.finish()
    down = np.linspace(0.0, 1.0, pixels)
    light = 165 - 50 * (0.6 * down[:, None] + 0.4 * down[None, :])
    gray = Image.fromarray(light.astype(np.uint8))
    return Image.merge("RGBA", (gray, gray, gray, alpha))


def _hat(pen: Pen) -> None:
    pen.disc(0.5, 0.86, 0.5, (38, 34, 48, 255), 0.13)
    pen.box(0.22, 0.05, 0.78, 0.88, (38, 34, 48, 255), 0.07)
    pen.box(0.22, 0.58, 0.78, 0.76, (214, 56, 60, 255))


def _crown(pen: Pen) -> None:
    tips = [(0.02, 0.2), (0.27, 0.52), (0.5, 0.06), (0.73, 0.52), (0.98, 0.2), (0.9, 0.97), (0.1, 0.97)]
    pen.polygon(tips, (250, 196, 30, 255))
    pen.box(0.1, 0.78, 0.9, 0.97, (206, 140, 10, 255))
    for x, y in ((0.06, 0.2), (0.5, 0.1), (0.94, 0.2)):
        pen.disc(x, y, 0.07, (226, 40, 70, 255))


def _bow(pen: Pen) -> None:
    pen.polygon([(0.0, 0.18), (0.5, 0.55), (0.0, 0.92)], (236, 52, 140, 255))
    pen.polygon([(1.0, 0.18), (0.5, 0.55), (1.0, 0.92)], (236, 52, 140, 255))
    pen.disc(0.5, 0.55, 0.16, (160, 20, 90, 255))


def _flag(pen: Pen) -> None:
    pen.box(0.3, 0.0, 0.39, 1.0, (90, 62, 40, 255))
    pen.polygon([(0.39, 0.04), (1.0, 0.28), (0.39, 0.54)], (20, 170, 190, 255))


PARTS: dict[str, Callable[[Pen], None]] = {"hat": _hat, "crown": _crown, "bow": _bow, "flag": _flag}


@lru_cache(maxsize=64)
def part(name: str, pixels: int) -> Image.Image:
    """Something to wear as RGBA, in its own colours."""
    pen = Pen("RGBA", pixels)
    PARTS[name](pen)
    return pen.finish()


@lru_cache(maxsize=128)
def plate(glyph: str, pixels: int) -> Image.Image:
    """A white plate with a dark bold letter or digit as RGBA."""
    pen = Pen("RGBA", pixels)
    pen.box(0.0, 0.0, 1.0, 1.0, (40, 40, 60, 255), 0.26)
    pen.box(0.05, 0.05, 0.95, 0.95, (255, 255, 255, 255), 0.22)
    font = ImageFont.load_default(size=0.92 * pen.scale)
    middle = (pen.scale / 2, pen.scale / 2)
    bold = max(1, round(0.035 * pen.scale))
    x0, y0, x1, y1 = pen.draw.textbbox(middle, glyph, font=font, anchor="mm", stroke_width=bold)
    at = (middle[0] * 2 - (x0 + x1) / 2, middle[1] * 2 - (y0 + y1) / 2)
    ink = (20, 20, 40, 255)
    pen.draw.text(at, glyph, font=font, anchor="mm", fill=ink, stroke_width=bold, stroke_fill=ink)
    return pen.finish()


@lru_cache(maxsize=64)
def texture(name: str, pixels: int) -> np.ndarray:
    """How much of a texture's colour lies where, float32 in [0, 1], [pixels, pixels]."""
    pen = Pen("L", pixels)
    if name == "striped":
        step = 0.25
        for i in range(-4, 9):
            x = i * step - 0.5
            pen.polygon([(x, 0.0), (x + 0.46 * step, 0.0), (x + 0.46 * step + 0.5, 1.0), (x + 0.5, 1.0)], 255)
    elif name == "dotted":
        step = 0.25
        for row in range(6):
            for column in range(6):
                pen.disc((column + 0.5 * (row % 2)) * step - 0.06, row * step * 0.87 + 0.06, 0.078, 255)
    elif name == "checked":
        step = 1 / 5
        for i in range(25):
            if i % 2 == 0:
                pen.box(i % 5 * step, i // 5 * step, (i % 5 + 1) * step, (i // 5 + 1) * step, 255)
    return np.asarray(pen.finish(), np.float32) / 255
