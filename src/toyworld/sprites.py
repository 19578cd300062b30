"""An object as a small image with transparency: tinted, textured, dressed and lettered.

A sprite fills a square of `pixels` a side. Half-made results are kept, since sizes and kinds are few and attributes
many.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from . import figures
from .kinds import KINDS
from .scene import COLORS, GLYPHS, PARTS, TEXTURES, Attributes

ASSETS = Path(__file__).parent / "assets"
ATLAS = ASSETS / "emoji.png"
ATLAS_COLUMNS = 9
TILE = 96  # pixels of an emoji in the atlas

TINTS: dict[str, tuple[int, int, int]] = {
    "red": (222, 34, 40),
    "orange": (248, 130, 14),
    "yellow": (250, 216, 24),
    "green": (44, 166, 58),
    "blue": (36, 96, 226),
    "purple": (138, 54, 190),
    "pink": (252, 128, 190),
    "gray": (142, 144, 150),
}
_KEPT = 0.12  # of the emoji's own colours
_RIM = 0.03  # width of the pale rim, of the sprite
_WORN = 0.80  # height of the body when something is worn on top of it
_PART = 0.40  # size of a part
_PLATE = 0.42  # size of a glyph's plate


@dataclass(frozen=True)
class Sprite:
    """An object's image.

    Attributes:
        color: float32 [pixels, pixels, 3] in [0, 255], times `alpha`.
        alpha: float32 [pixels, pixels, 1] in [0, 1].
        shadow: float32 [pixels + 2 pad, pixels + 2 pad, 1], darkness that it casts around and under itself.
        pad: by how much the shadow is larger on each side.
        box: x0, y0, x1, y1 of what is opaque, ends exclusive.
    """

    color: np.ndarray
    alpha: np.ndarray
    shadow: np.ndarray
    pad: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class _Body:
    """A kind at a size, before it has a colour: `own` colours, `light` in [0, 1] around 0.5, `alpha`, `rim`."""

    own: np.ndarray
    light: np.ndarray
    alpha: np.ndarray
    rim: np.ndarray
    top: tuple[float, float]  # where a part sits, pixels
    foot: tuple[float, float]  # where a plate stands, pixels


@cache
def _atlas() -> dict[str, Image.Image]:
    with Image.open(ATLAS) as image:
        names = str(image.info["kinds"]).split()  # which emoji are on it, in order
        whole = image.convert("RGBA")
    places = [(i % ATLAS_COLUMNS * TILE, i // ATLAS_COLUMNS * TILE) for i in range(len(names))]
    return {name: whole.crop((x, y, x + TILE, y + TILE)) for name, (x, y) in zip(names, places, strict=True)}


def _evened(gray: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Brightness, moved and stretched so that every emoji, black or white, has room for a tint. The mean is 0.5."""
    weight = alpha.sum()
    mean = (gray * alpha).sum() / weight
    spread = np.sqrt(((gray - mean) ** 2 * alpha).sum() / weight)
    gain = min(0.2 / max(spread, 1e-3), 2.2)
    return np.clip(0.5 + (gray - mean) * gain, 0.03, 1.0)


@lru_cache(maxsize=512)
def _body(kind: str, pixels: int, worn: bool) -> _Body:
    rim = max(1.0, _RIM * pixels)
    size = round((_WORN if worn else 1.0) * pixels - 2 * rim)
    if KINDS[kind].emoji:
        drawn = _atlas()[kind].resize((size, size), Image.Resampling.LANCZOS)
    else:
        drawn = figures.figure(kind, size)
    x, y = (pixels - size) // 2, round(pixels - rim - size)
    box = drawn.getchannel("A").point([255 * (value > 100) for value in range(256)]).getbbox()
    if worn and box is not None:  # a flat object still stands on the ground, and its hat on it
        y += size - box[3]
    whole = Image.new("RGBA", (pixels, pixels))
    whole.paste(drawn, (x, y))
    values = np.asarray(whole, np.float32)
    own, alpha = values[..., :3], values[..., 3:] / 255
    gray = own @ np.array([0.299, 0.587, 0.114], np.float32)
    light = _evened(gray[..., None] / 255, alpha)
    grown = whole.getchannel("A").filter(ImageFilter.GaussianBlur(0.6 * rim))
    halo = np.clip(np.asarray(grown, np.float32)[..., None] / 255 * 3.5, 0, 1)
    solid = alpha[..., 0] > 0.5
    rows, columns = np.nonzero(solid)
    near_top = columns[rows <= rows.min() + 0.06 * pixels]
    top = (float(near_top.mean()), float(rows.min()))
    foot = (float(columns[rows >= rows.mean()].mean()), float(rows.max() + 1))
    return _Body(own, light, alpha, halo, top, foot)


@cache
def _ramp(color: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Dark, middle and light of a colour, and what its textures are painted with."""
    middle = np.array(TINTS[color], np.float32)
    dark, light = 0.25 * middle, 0.35 * middle + 0.65 * 255
    bright = middle @ np.array([0.299, 0.587, 0.114], np.float32) > 155
    return dark, middle, light, 0.3 * middle if bright else 0.1 * middle + 0.9 * 255


def _painted(body: _Body, attributes: Attributes, pixels: int) -> np.ndarray:
    """Colours of a body, float32 [pixels, pixels, 3]."""
    dark, middle, light, pattern = _ramp(attributes.color)
    low = np.minimum(body.light * 2, 1)
    high = np.maximum(body.light * 2 - 1, 0)
    color = dark + (middle - dark) * low + (light - middle) * high
    color += _KEPT * (0.4 if attributes.color == "gray" else 1.0) * (body.own - color)
    if attributes.texture != "plain":
        strength = 0.75 * figures.texture(attributes.texture, pixels)[..., None]
        color += strength * (pattern * (0.55 + 0.45 * low) - color)
    return color


def _lay(color: np.ndarray, alpha: np.ndarray, image: Image.Image, left: float, top: float) -> None:
    """Put an RGBA image over premultiplied colours, in place, moved so that it lies within them."""
    size = image.size
    x = int(np.clip(round(left), 0, color.shape[1] - size[0]))
    y = int(np.clip(round(top), 0, color.shape[0] - size[1]))
    values = np.asarray(image, np.float32)
    over = values[..., 3:] / 255
    here = np.s_[y : y + size[1], x : x + size[0]]
    color[here] = color[here] * (1 - over) + values[..., :3] * over
    alpha[here] = alpha[here] * (1 - over) + over


@lru_cache(maxsize=512)
def _shadow(kind: str, part: str, pixels: int) -> tuple[np.ndarray, int]:
    pad = max(2, round(0.09 * pixels))
    alpha = _body(kind, pixels, part != "none").rim[..., 0]
    large = Image.fromarray((np.pad(alpha, pad) * 255).astype(np.uint8))
    soft = np.asarray(large.filter(ImageFilter.GaussianBlur(0.035 * pixels)), np.float32)
    return 0.3 / 255 * np.roll(soft, (max(1, round(0.045 * pixels)), max(1, round(0.02 * pixels))), (0, 1))[
        ..., None
    ], pad


def known(what: str, value: str, options: Iterable[str]) -> None:
    """Raise ValueError unless there is such a value."""
    if value not in options:
        raise ValueError(f"unknown {what} {value!r}; there are: {', '.join(options)}")


@lru_cache(maxsize=1024)
def sprite(attributes: Attributes, pixels: int) -> Sprite:
    """Draw an object.

    Args:
        attributes: its attributes.
        pixels: side of the square that it fills, at least 8.

    Raises:
        ValueError: an attribute has an unknown value, or the object is too small to draw.
    """
    for name, options in (("kind", KINDS), ("color", COLORS), ("texture", TEXTURES), ("part", PARTS)):
        known(name, getattr(attributes, name), options)
    known("glyph", attributes.glyph, ("", *GLYPHS))
    if pixels < 8:
        raise ValueError(f"an object of {pixels} pixels is too small to draw; draw images of at least 36")
    body = _body(attributes.kind, pixels, attributes.part != "none")
    rim = np.float32(252.0)
    alpha = np.maximum(body.rim, body.alpha)
    color = _painted(body, attributes, pixels) * body.alpha + rim * (alpha - body.alpha)
    if attributes.part != "none":
        side = round(_PART * pixels)
        _lay(color, alpha, figures.part(attributes.part, side), body.top[0] - side / 2, body.top[1] - 0.72 * side)
    if attributes.glyph:
        side = round(_PLATE * pixels)
        _lay(color, alpha, figures.plate(attributes.glyph, side), body.foot[0] - side / 2, body.foot[1] - 0.92 * side)
    rows, columns = np.nonzero(alpha[..., 0] > 0.5)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    shadow, pad = _shadow(attributes.kind, attributes.part, pixels)
    return Sprite(color, alpha, shadow, pad, box)


@lru_cache(maxsize=2048)
def outline(kind: str, part: str, plate: bool, pixels: int) -> Sprite:
    """A sprite of that shape, in whatever colours: there are a thousand of them, and many thousand sprites."""
    return sprite(Attributes(kind, COLORS[0], part=part, glyph=GLYPHS[0] if plate else ""), pixels)
