"""From a scene to its image, its boxes and its label map."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .grounds import ground, to_pil
from .kinds import KINDS
from .scene import GRID, GROUNDS, Scene, SceneObject
from .sprites import Sprite, known, outline, sprite

SCALES = {"small": 0.64, "big": 0.95}  # side of an object's square, in cells
GROUND_LABELS = {name: 1 + i for i, name in enumerate(GROUNDS)}
KIND_LABELS = {name: 1 + len(GROUNDS) + i for i, name in enumerate(KINDS)}
LABELS = {**GROUND_LABELS, **KIND_LABELS}
"""Ids in a label map: 1 to 6 the grounds, then a kind each, in `KINDS`' order; below 150. 0 is never drawn: it means
unlabelled, as in ADE20K."""


def drawing_order(scene: Scene) -> list[int]:
    """Numbers of the objects, the first to be drawn first: what is behind its host before it, what is inside after it.

    Raises:
        ValueError: a host is missing, unknown, or (through others) its own host.
    """
    order: list[int] = []
    hosted: dict[int | None, list[int]] = {}
    for i, obj in enumerate(scene.objects):
        host = None if obj.place == "cell" else obj.host
        if obj.place != "cell" and (host is None or not 0 <= host < len(scene.objects)):
            raise ValueError(f"object {i} is {obj.place} object {host}, of which there is none")
        hosted.setdefault(host, []).append(i)

    def visit(i: int) -> None:
        for before in hosted.get(i, []):
            if scene.objects[before].place == "behind":
                visit(before)
        order.append(i)
        for after in hosted.get(i, []):
            if scene.objects[after].place == "inside":
                visit(after)

    for i in hosted.get(None, []):
        visit(i)
    if len(order) < len(scene.objects):
        raise ValueError(f"objects {sorted(set(range(len(scene.objects))) - set(order))} are hosts of each other")
    return order


def _placed(obj: SceneObject, size: int, shape_only: bool = False) -> tuple[Sprite, int, int]:
    """An object's sprite, or one of its shape in other colours, and where its square's left upper corner is."""
    known("size", obj.size, SCALES)
    cell = size / GRID
    pixels = round(SCALES[obj.size] * cell)
    x = (obj.column + 0.5 + obj.offset[0]) * cell - pixels / 2
    y = (obj.row + 0.5 + obj.offset[1]) * cell - pixels / 2
    own = obj.attributes
    found = outline(own.kind, own.part, bool(own.glyph), pixels) if shape_only else sprite(own, pixels)
    return found, round(x), round(y)


def _overlap(x: int, y: int, pixels: int, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
    """Where a square lies in the image, and which part of the square that is."""
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + pixels, size), min(y + pixels, size)
    if x0 >= x1 or y0 >= y1:
        return None
    return np.s_[y0:y1, x0:x1], np.s_[y0 - y : y1 - y, x0 - x : x1 - x]


def draw(scene: Scene, size: int = 256) -> Image.Image:
    """Draw a scene. The same scene and size give the same pixels.

    Args:
        scene: what to draw.
        size: side in pixels, at least 36.

    Returns:
        An RGB image [size, size].

    Raises:
        ValueError: a trait, size or ground that there is not, a host that cannot be, or too small an image.
    """
    known("ground", scene.ground, GROUNDS)
    canvas = ground(scene.ground, scene.seed, size)
    for i in drawing_order(scene):
        one, x, y = _placed(scene.objects[i], size)
        where = _overlap(x - one.pad, y - one.pad, len(one.shadow), size)
        if where:
            canvas[where[0]] *= 1 - one.shadow[where[1]]
        where = _overlap(x, y, len(one.alpha), size)
        if where:
            here = canvas[where[0]]
            here *= 1 - one.alpha[where[1]]
            here += one.color[where[1]]
    return to_pil(canvas)


def boxes(scene: Scene, size: int = 256) -> list[tuple[int, int, int, int]]:
    """Where each object is: x0, y0, x1, y1 of its own shape with what it wears, ends exclusive, cut at the image's
    edge. What hides an object does not shrink its box; a shadow is not part of it.
    """
    found = []
    for obj in scene.objects:
        one, x, y = _placed(obj, size, shape_only=True)
        edges = (x + one.box[0], y + one.box[1], x + one.box[2], y + one.box[3])
        found.append(tuple(min(max(edge, 0), size) for edge in edges))
    return found


def owners(scene: Scene, size: int = 256) -> np.ndarray:
    """Number of the object that is seen at each pixel, -1 for the ground; int16 [size, size]."""
    out = np.full((size, size), -1, np.int16)
    for i in drawing_order(scene):
        one, x, y = _placed(scene.objects[i], size, shape_only=True)
        where = _overlap(x, y, len(one.alpha), size)
        if where:
            out[where[0]][one.alpha[where[1]][..., 0] > 0.5] = i
    return out


def visible(scene: Scene, size: int = 96) -> list[float]:
    """Share of each object's own shape that is seen: not hidden by others nor cut off by the image's edge."""
    seen = owners(scene, size)
    whole = [int((_placed(obj, size, shape_only=True)[0].alpha > 0.5).sum()) for obj in scene.objects]
    return [int((seen == i).sum()) / area for i, area in enumerate(whole)]


def label_map(scene: Scene, size: int = 256) -> np.ndarray:
    """What is seen at each pixel, ids of `LABELS`, uint8 [size, size]."""
    table = [KIND_LABELS[obj.attributes.kind] for obj in scene.objects] + [GROUND_LABELS[scene.ground]]
    return np.array(table, np.uint8)[owners(scene, size)]
