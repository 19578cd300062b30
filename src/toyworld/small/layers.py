"""A scene as a list of layers, for drawing many scenes at once; `compose` puts them over each other.

`draw.draw` paints one scene with NumPy. Here everything that a scene can show is painted once, into an atlas, and a
scene is a background and a list of places in that atlas. The arithmetic is `draw`'s, so the images differ from its by
at most one step of 255 at a few pixels.

Axes: I images, L layers of all images, P numbers of the atlas, h and w height and width of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from mm_interleaved.tasks.ade20k import colored

from .. import figures
from ..draw import GROUND_LABELS, KIND_LABELS, SCALES, drawing_order
from ..grounds import _DECOR, _plane, _shape
from ..kinds import KINDS
from ..scene import COLORS, GLYPHS, GRID, GROUNDS, PARTS, TEXTURES, Attributes, Scene, SceneObject
from ..sprites import _PART, _PLATE, _body, _painted, _shadow

PHASES = 8  # of the hills of a ground
PAINTED, TINTED, CUT = 0.0, 1.0, 2.0
"""How a layer is read: its own colours and alpha [4, h, w]; alpha [h, w] of one colour; the same, cut at one half."""
OFFSET, LEFT, TOP, WIDTH, HEIGHT, MODE, STRIDE, OPACITY, RED, GREEN, BLUE, COLUMNS = range(12)
"""Columns of a layer. `STRIDE`: numbers between the planes of a painted layer."""

_KINDS, _SIZES = tuple(KINDS), tuple(SCALES)


@dataclass
class LayeredImages:
    """Images to be composed.

    Attributes:
        planes: int32 [I], the background of each, ground * PHASES + phase; -1: black.
        starts: int32 [I + 1], where each image's layers begin.
        layers: float32 [L, COLUMNS]; offsets are below 2^31 and stored as the bits of an int32.
    """

    planes: np.ndarray
    starts: np.ndarray
    layers: np.ndarray

    @classmethod
    def join(cls, images: list[tuple[int, np.ndarray]], fill: int = 0) -> LayeredImages:
        """Of single images (background, layers), and black ones until there are `fill`."""
        images = images + [(-1, np.zeros((0, COLUMNS), np.float32))] * max(0, fill - len(images))
        counts = np.cumsum([0] + [len(layers) for _, layers in images])
        planes = np.array([plane for plane, _ in images], np.int32)
        return cls(planes, counts.astype(np.int32), np.concatenate([layers for _, layers in images]))


class Atlas:
    """Everything that scenes of one size show, painted once.

    Args:
        size: side of the images in pixels.
    """

    def __init__(self, size: int = 128) -> None:
        self.size = size
        self._parts: list[np.ndarray] = []
        self._length = 0
        self.pixels = [round(SCALES[name] * size / GRID) for name in _SIZES]
        self._bodies = {key: self._add_body(*key) for key in product(_KINDS, (False, True), range(len(_SIZES)))}
        self._worn: dict[tuple[str, int], tuple[int, int]] = {}
        self._plates: dict[tuple[str, int], tuple[int, int]] = {}
        for number, pixels in enumerate(self.pixels):
            for part in PARTS[1:]:
                self._worn[part, number] = self._add_picture(figures.part(part, round(_PART * pixels)))
            for glyph in GLYPHS:
                self._plates[glyph, number] = self._add_picture(figures.plate(glyph, round(_PLATE * pixels)))
        self._whole = self._add(np.ones((size, size), np.float32))
        self._decor = {name: [self._strewn(*entry) for entry in _DECOR[name]] for name in GROUNDS}
        self.planes = np.stack([_plane(name, size, phase) for name in GROUNDS for phase in range(PHASES)])
        self.planes = np.ascontiguousarray(self.planes.transpose(0, 3, 1, 2), np.float32)  # [grounds, 3, h, w]

    @cached_property
    def values(self) -> np.ndarray:
        """float32 [P], all layers one after the other."""
        values = np.concatenate(self._parts)
        self._parts = []
        return values

    def _add(self, values: np.ndarray) -> int:
        self._parts.append(np.ascontiguousarray(values, np.float32).reshape(-1))
        self._length += values.size
        return self._length - values.size

    def _add_picture(self, picture: object) -> tuple[int, int]:
        """An RGBA image as a painted layer: its offset and side."""
        values = np.asarray(picture, np.float32)
        alpha = values[..., 3:] / 255
        whole = np.concatenate([values[..., :3] * alpha, alpha], axis=2)
        return self._add(whole.transpose(2, 0, 1)), len(values)

    def _add_body(self, kind: str, worn: bool, size: int) -> _Body:
        pixels = self.pixels[size]
        body = _body(kind, pixels, worn)
        alpha = np.maximum(body.rim, body.alpha)
        offsets = np.zeros((len(COLORS), len(TEXTURES)), np.int64)
        for (i, color), (j, texture) in product(enumerate(COLORS), enumerate(TEXTURES)):
            own = _painted(body, Attributes(kind, color, texture), pixels) * body.alpha
            own = own + np.float32(252.0) * (alpha - body.alpha)
            offsets[i, j] = self._add(np.concatenate([own, alpha], axis=2).transpose(2, 0, 1))
        shadow, pad = _shadow(kind, PARTS[int(worn)], pixels)
        part, plate = round(_PART * pixels), round(_PLATE * pixels)
        part_at = _inside(body.top[0] - part / 2, body.top[1] - 0.72 * part, part, pixels)
        plate_at = _inside(body.foot[0] - plate / 2, body.foot[1] - 0.92 * plate, plate, pixels)
        return _Body(offsets, pixels, self._add(shadow[..., 0]), pad, part_at, plate_at)

    def _strewn(self, shape: str, color: tuple[int, int, int], opacity: float, number: int, width: float,
                first: float, last: float) -> _Strewn:  # fmt: skip
        sides = [max(3, round(width * self.size * (0.55 + 0.15 * steps))) for steps in (1, 2, 3)]
        shapes = [_shape(shape, side)[..., 0] for side in sides]
        table = np.array([[self._add(s), s.shape[1], s.shape[0]] for s in shapes], np.int64)
        return _Strewn(table, np.array([opacity, *color], np.float32), number, first, last)

    def image(self, scene: Scene) -> tuple[int, np.ndarray]:
        """Background and layers of a scene's image."""
        rows = self._ground(scene)
        for i in drawing_order(scene):
            rows += self._object(scene.objects[i])
        return GROUNDS.index(scene.ground) * PHASES + scene.seed % PHASES, _table(rows)

    def label_map(self, scene: Scene) -> tuple[int, np.ndarray]:
        """Background and layers of a scene's coloured label map."""
        side = self.size
        tint = _tint(GROUND_LABELS[scene.ground])
        rows = [np.array([[self._whole, 0, 0, side, side, TINTED, 0, 1.0, *tint]], np.float64)]
        for i in drawing_order(scene):
            tint = _tint(KIND_LABELS[scene.objects[i].attributes.kind])
            for row in self._object(scene.objects[i])[1:]:
                alpha = row[:, OFFSET] + 3 * row[:, STRIDE]
                rows.append(np.array([[alpha[0], *row[0, LEFT:MODE], CUT, 0, 1.0, *tint]]))
        return -1, _table(rows)

    def _ground(self, scene: Scene) -> list[np.ndarray]:
        rng, rows = np.random.default_rng(scene.seed), []
        for strewn in self._decor[scene.ground]:
            places = rng.random((strewn.number, 3), dtype=np.float32).astype(np.float64)
            shapes = strewn.shapes[(places[:, 2] * 3).astype(np.int64)]
            row = np.zeros((strewn.number, COLUMNS))
            row[:, OFFSET], row[:, WIDTH], row[:, HEIGHT] = shapes.T
            row[:, LEFT] = np.rint(places[:, 0] * self.size - row[:, WIDTH] / 2)
            heights = strewn.first + (strewn.last - strewn.first) * places[:, 1]
            row[:, TOP] = np.rint(heights * self.size - row[:, HEIGHT] / 2)
            row[:, MODE], row[:, OPACITY:] = TINTED, strewn.paint
            rows.append(row)
        return rows

    def _object(self, obj: SceneObject) -> list[np.ndarray]:
        """Its shadow, its body, and what it wears and shows."""
        own, size, cell = obj.attributes, _SIZES.index(obj.size), self.size / GRID
        body = self._bodies[own.kind, own.part != "none", size]
        side = body.side
        x = round((obj.column + 0.5 + obj.offset[0]) * cell - side / 2)
        y = round((obj.row + 0.5 + obj.offset[1]) * cell - side / 2)
        dark, pad = side + 2 * body.pad, body.pad
        sprite = body.offsets[COLORS.index(own.color), TEXTURES.index(own.texture)]
        rows = [[body.shadow, x - pad, y - pad, dark, dark, TINTED, 0, 1, 0, 0, 0],
                [sprite, x, y, side, side, PAINTED, side * side, 1, 0, 0, 0]]  # fmt: skip
        if own.part != "none":
            offset, side = self._worn[own.part, size]
            rows.append([offset, x + body.part[0], y + body.part[1], side, side, PAINTED, side * side, 1, 0, 0, 0])
        if own.glyph:
            offset, side = self._plates[own.glyph, size]
            rows.append([offset, x + body.plate[0], y + body.plate[1], side, side, PAINTED, side * side, 1, 0, 0, 0])
        return [np.array([row], np.float64) for row in rows]


@dataclass
class _Body:
    """Where a kind of one size is in the atlas, by colour and texture; its shadow; where a part and a plate go."""

    offsets: np.ndarray
    side: int
    shadow: int
    pad: int
    part: tuple[int, int]
    plate: tuple[int, int]


@dataclass
class _Strewn:
    """A shape of a ground: (offset, width, height) by size, (opacity, colour), how many, and between which heights."""

    shapes: np.ndarray
    paint: np.ndarray
    number: int
    first: float
    last: float


def _inside(left: float, top: float, side: int, whole: int) -> tuple[int, int]:
    return int(np.clip(round(left), 0, whole - side)), int(np.clip(round(top), 0, whole - side))


def _tint(label: int) -> list[float]:
    """The colour of a label."""
    return np.asarray(colored(np.array([[label]])))[0, 0].tolist()


def _table(rows: list[np.ndarray]) -> np.ndarray:
    """float32 [layers, COLUMNS]; the first column holds the bits of an int32."""
    table = np.concatenate(rows)
    out = table.astype(np.float32)
    out[:, OFFSET] = table[:, OFFSET].astype(np.int32).view(np.float32)
    return out
