"""Backgrounds: two or three smooth planes, with soft shapes that a scene's seed places and that look like no object."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from .figures import Pen

Color = tuple[int, int, int]
# Per ground: colours from the top to the horizon, from the horizon to the bottom, height of the horizon (0 at the top),
# and what is strewn: (shape, colour, opacity, number, size, from, to), sizes and heights in images.
_PLANES: dict[str, tuple[tuple[Color, Color], tuple[Color, Color], float]] = {
    "meadow": (((176, 222, 250), (222, 240, 250)), ((176, 214, 140), (134, 190, 108)), 0.42),
    "beach": (((190, 230, 246), (118, 200, 222)), ((250, 232, 190), (234, 206, 150)), 0.40),
    "snow": (((196, 212, 232), (224, 232, 242)), ((250, 252, 255), (222, 232, 244)), 0.38),
    "night": (((22, 24, 58), (52, 50, 100)), ((44, 58, 74), (28, 40, 56)), 0.66),
    "sea": (((150, 214, 232), (70, 160, 204)), ((70, 160, 204), (24, 92, 150)), 0.5),
    "room": (((244, 226, 206), (236, 212, 188)), ((196, 154, 118), (168, 124, 90)), 0.68),
}
_DECOR: dict[str, tuple[tuple[str, Color, float, int, float, float, float], ...]] = {
    "meadow": (("blot", (255, 255, 255), 0.75, 3, 0.34, 0.02, 0.26), ("blot", (108, 168, 84), 0.5, 6, 0.22, 0.5, 1.0)),
    "beach": (("blot", (255, 255, 255), 0.7, 2, 0.34, 0.02, 0.2), ("blot", (214, 184, 128), 0.45, 6, 0.22, 0.5, 1.0)),
    "snow": (("blot", (255, 255, 255), 0.9, 3, 0.4, 0.05, 0.3), ("blot", (206, 220, 238), 0.6, 6, 0.26, 0.45, 1.0)),
    "night": (("spark", (255, 246, 200), 0.9, 26, 0.03, 0.0, 0.6), ("blot", (70, 84, 110), 0.5, 4, 0.3, 0.72, 1.0)),
    "sea": (("wave", (225, 245, 252), 0.5, 9, 0.2, 0.1, 1.0), ("blot", (16, 80, 140), 0.35, 4, 0.3, 0.5, 1.0)),
    "room": (("wave", (132, 90, 60), 0.45, 12, 0.3, 0.72, 1.0),),
}  # fmt: skip


_WAVY = {"meadow": 0.035, "snow": 0.03, "night": 0.025}  # how far the horizon rises and falls, in images


@lru_cache(maxsize=64)
def _plane(ground: str, size: int, phase: int) -> np.ndarray:
    """The planes, float32 [size, size, 3]; `phase`, an eighth of a wave, moves the hills."""
    (top, above), (below, bottom), horizon = _PLANES[ground]
    y = (np.arange(size, dtype=np.float32)[:, None, None] + 0.5) / size
    sky = np.array(top) + (np.array(above) - np.array(top)) * (y / horizon)
    floor = np.array(below) + (np.array(bottom) - np.array(below)) * ((y - horizon) / (1 - horizon))
    x = (np.arange(size, dtype=np.float32)[None, :, None] + 0.5) / size
    hills = horizon + _WAVY.get(ground, 0.0) * np.sin(2 * np.pi * (x + phase / 8))
    share = np.clip((y - hills) * size / 1.5 + 0.5, 0, 1)
    if ground == "room":  # wallpaper
        sky = sky - 5 * (np.sin(2 * np.pi * 9 * (x + phase / 72)) > 0)
    return (sky * (1 - share) + floor * share).astype(np.float32)


@lru_cache(maxsize=64)
def _shape(name: str, pixels: int) -> np.ndarray:
    """How dense a strewn shape is, float32 [height, pixels, 1]."""
    if name == "blot":  # an even, flat cloud
        pen = Pen("L", pixels, 0.5)
        for x, y, radius in ((0.3, 0.3, 0.12), (0.48, 0.24, 0.16), (0.68, 0.3, 0.12), (0.5, 0.32, 0.13)):
            pen.disc(x, y, radius, 255, 0.7 * radius)
        soft = pen.finish().filter(ImageFilter.GaussianBlur(0.035 * pixels))
    elif name == "wave":
        pen = Pen("L", pixels, 0.2)
        pen.disc(0.5, 0.1, 0.42, 255, 0.035)
        soft = pen.finish().filter(ImageFilter.GaussianBlur(0.012 * pixels))
    else:
        pen = Pen("L", pixels)
        pen.disc(0.5, 0.5, 0.28, 255)
        soft = pen.finish()
    return np.asarray(soft, np.float32)[..., None] / 255


def ground(name: str, seed: int, size: int) -> np.ndarray:
    """A background, float32 [size, size, 3] in [0, 255], the caller's own.

    Args:
        name: of `scene.GROUNDS`.
        seed: of where objects are strewn.
        size: side of the image in pixels.
    """
    out = _plane(name, size, seed % 8).copy()
    rng = np.random.default_rng(seed)
    for shape, color, opacity, number, width, first, last in _DECOR[name]:
        places = rng.random((number, 3), dtype=np.float32)
        for x, y, scale in places.tolist():
            steps = 1 + int(scale * 3)  # few sizes, so that shapes are kept
            density = _shape(shape, max(3, round(width * size * (0.55 + 0.15 * steps))))
            height, breadth = density.shape[:2]
            left = round(x * size - breadth / 2)
            upper = round((first + (last - first) * y) * size - height / 2)
            x0, y0, x1, y1 = max(left, 0), max(upper, 0), min(left + breadth, size), min(upper + height, size)
            if x0 >= x1 or y0 >= y1:
                continue
            share = opacity * density[y0 - upper : y1 - upper, x0 - left : x1 - left]
            here = out[y0:y1, x0:x1]
            here += share * (np.array(color, np.float32) - here)
    return out


def to_pil(values: np.ndarray) -> Image.Image:
    """Colours in [0, 255] as an image."""
    return Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8))
