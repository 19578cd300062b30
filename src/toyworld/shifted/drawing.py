"""From a scene of the shifted world to its image, boxes and label map: flat silhouettes with a dark outline."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageFilter

from ..figures import Pen
from ..grounds import to_pil
from ..scene import GRID, Scene, SceneObject
from .world import COLORS, GROUNDS, KINDS, Color

SIDE = 0.9  # of an object's square, in cells
RIM = 0.05  # width of the outline, of the square
INK = (20, 18, 24)
FIRST_LABEL = 100  # the first world's labels are below
LABELS = {name: FIRST_LABEL + i for i, name in enumerate((*GROUNDS, *KINDS))}
# Of each ground: colours of its upper and lower part, height of the horizon, colour and kind of its marks.
_PLANES: dict[str, tuple[Color, Color, float, Color, str]] = {
    "desert": ((250, 222, 196), (222, 178, 140), 0.55, (204, 158, 122), "dune"),
    "lava": ((104, 96, 100), (156, 96, 84), 0.5, (236, 120, 84), "crack"),
    "swamp": ((150, 166, 158), (84, 98, 82), 0.4, (112, 124, 104), "reed"),
    "city": ((196, 200, 212), (124, 126, 136), 0.62, (158, 162, 174), "block"),
}


def _arrow(pen: Pen) -> None:
    pen.polygon([(0.5, 0.0), (0.98, 0.48), (0.68, 0.48), (0.68, 1.0), (0.32, 1.0), (0.32, 0.48), (0.02, 0.48)], 255)


def _hourglass(pen: Pen) -> None:
    pen.polygon([(0.08, 0.02), (0.92, 0.02), (0.56, 0.5), (0.92, 0.98), (0.08, 0.98), (0.44, 0.5)], 255)


def _key(pen: Pen) -> None:
    pen.disc(0.5, 0.26, 0.26, 255)
    pen.disc(0.5, 0.26, 0.11, 0)
    pen.box(0.42, 0.46, 0.58, 1.0, 255)
    pen.box(0.56, 0.66, 0.8, 0.78, 255)
    pen.box(0.56, 0.86, 0.74, 0.98, 255)


def _anchor(pen: Pen) -> None:
    pen.disc(0.5, 0.12, 0.12, 255)
    pen.box(0.43, 0.18, 0.57, 0.96, 255)
    pen.box(0.2, 0.28, 0.8, 0.4, 255)
    pen.polygon([(0.0, 0.58), (0.16, 0.56), (0.3, 0.8), (0.5, 0.86), (0.7, 0.8), (0.84, 0.56), (1.0, 0.58), (0.84, 0.9),
                 (0.5, 1.0), (0.16, 0.9)], 255)  # fmt: skip


def _bolt(pen: Pen) -> None:
    pen.polygon([(0.62, 0.0), (0.14, 0.58), (0.46, 0.58), (0.32, 1.0), (0.86, 0.38), (0.54, 0.38), (0.8, 0.0)], 255)


def _drop(pen: Pen) -> None:
    pen.disc(0.5, 0.66, 0.34, 255)
    pen.polygon([(0.5, 0.0), (0.8, 0.5), (0.2, 0.5)], 255)


def _bell(pen: Pen) -> None:
    pen.disc(0.5, 0.36, 0.3, 255)
    pen.polygon([(0.2, 0.36), (0.8, 0.36), (0.98, 0.82), (0.02, 0.82)], 255)
    pen.disc(0.5, 0.88, 0.12, 255)
    pen.box(0.45, 0.0, 0.55, 0.12, 255)


def _umbrella(pen: Pen) -> None:
    pen.disc(0.5, 0.5, 0.5, 255)
    pen.box(0.0, 0.5, 1.0, 1.0, 0)
    pen.box(0.46, 0.48, 0.56, 0.96, 255)
    pen.box(0.3, 0.88, 0.56, 1.0, 255)


def _hammer(pen: Pen) -> None:
    pen.box(0.04, 0.04, 0.96, 0.36, 255)
    pen.box(0.4, 0.3, 0.6, 1.0, 255)


def _bottle(pen: Pen) -> None:
    pen.box(0.4, 0.0, 0.6, 0.34, 255)
    pen.box(0.24, 0.36, 0.76, 1.0, 255, 0.06)
    pen.polygon([(0.4, 0.26), (0.6, 0.26), (0.76, 0.44), (0.24, 0.44)], 255)


FIGURES: dict[str, Callable[[Pen], None]] = {
    "arrow": _arrow, "hourglass": _hourglass, "key": _key, "anchor": _anchor, "bolt": _bolt, "drop": _drop,
    "bell": _bell, "umbrella": _umbrella, "hammer": _hammer, "bottle": _bottle,
}  # fmt: skip


@lru_cache(maxsize=64)
def shape(kind: str, pixels: int) -> np.ndarray:
    """How much of a silhouette covers each pixel, float32 [pixels, pixels] in [0, 1]."""
    pen = Pen("L", pixels)
    FIGURES[kind](pen)
    return np.asarray(pen.finish(), np.float32) / 255


@cache
def _sprite(kind: str, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of the silhouette and of it with its outline, each float32 [pixels, pixels, 1]."""
    rim = max(1, round(RIM * pixels))
    inner = np.zeros((pixels, pixels), np.float32)
    inner[rim:-rim, rim:-rim] = shape(kind, pixels - 2 * rim)
    grown = Image.fromarray((inner * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * rim + 1))
    return inner[..., None], np.asarray(grown, np.float32)[..., None] / 255


def _place(obj: SceneObject, size: int) -> tuple[int, int, int]:
    """Left and upper edge of an object's square, and its side, in pixels."""
    cell = size / GRID
    side = round(SIDE * cell)
    x = (obj.column + 0.5 + obj.offset[0]) * cell - side / 2
    y = (obj.row + 0.5 + obj.offset[1]) * cell - side / 2
    return min(max(round(x), 0), size - side), min(max(round(y), 0), size - side), side


def _ground(name: str, seed: int, size: int) -> np.ndarray:
    """A background, float32 [size, size, 3]."""
    above, below, horizon, mark, kind = _PLANES[name]
    y = (np.arange(size)[:, None, None] + 0.5) / size
    out = np.where(y < horizon, np.array(above), np.array(below)).astype(np.float32)
    out = np.broadcast_to(out, (size, size, 3)).copy()
    rng = np.random.default_rng(seed)
    pen = Pen("L", size)
    for x, down, scale in rng.random((8, 3)).tolist():
        top = horizon + (1 - horizon) * down
        if kind == "dune":
            pen.disc(x, top + 0.03, 0.1 + 0.08 * scale, 255, 0.015)
        elif kind == "crack":
            pen.polygon([(x, top), (x + 0.03, top - 0.02), (x + 0.12 + 0.1 * scale, top + 0.03)], 255)
        elif kind == "reed":
            pen.polygon([(x, top), (x + 0.012, top), (x + 0.02, top - 0.1 - 0.08 * scale)], 255)
        else:
            pen.box(x, horizon - 0.1 - 0.35 * scale * down, x + 0.07 + 0.06 * scale, horizon, 255)
    share = 0.6 * np.asarray(pen.finish(), np.float32)[..., None] / 255
    return out * (1 - share) + np.array(mark, np.float32) * share


def draw(scene: Scene, size: int = 256) -> Image.Image:
    """The image of a scene, RGB [size, size]. The same scene and size give the same pixels."""
    canvas = _ground(scene.ground, scene.seed, size)
    for obj in scene.objects:
        x, y, side = _place(obj, size)
        inner, outer = _sprite(obj.attributes.kind, side)
        here = canvas[y : y + side, x : x + side]
        here += outer * (np.array(INK, np.float32) - here)
        here += inner * (np.array(COLORS[obj.attributes.color], np.float32) - here)
    return to_pil(canvas)


def boxes(scene: Scene, size: int = 256) -> list[tuple[int, int, int, int]]:
    """Box of each object with its outline: x0, y0, x1, y1, ends exclusive."""
    found = []
    for obj in scene.objects:
        x, y, side = _place(obj, size)
        rows, columns = np.nonzero(_sprite(obj.attributes.kind, side)[1][..., 0] > 0.5)
        found.append((x + int(columns.min()), y + int(rows.min()), x + int(columns.max()) + 1, y + int(rows.max()) + 1))
    return found


def label_map(scene: Scene, size: int = 256) -> np.ndarray:
    """What is seen at each pixel, ids of `LABELS`, uint8 [size, size]."""
    out = np.full((size, size), LABELS[scene.ground], np.uint8)
    for obj in scene.objects:
        x, y, side = _place(obj, size)
        mask = _sprite(obj.attributes.kind, side)[1][..., 0] > 0.5
        out[y : y + side, x : x + side][mask] = LABELS[obj.attributes.kind]
    return out
