"""What a drawn or generated image shows, and what a text names, without a trained detector.

Every colour of an object is far from all colours of grounds, and objects stand in cells. So a cell's object is found by
the colour that most of its pixels have, and its kind by the silhouette that these pixels agree with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import PIL.Image

from ..scene import GRID, Scene
from .drawing import shape
from .world import COLORS, KINDS

PIXELS = 120  # side at which images are read
_SHAPE = 24  # side at which silhouettes are compared
FAR = 60.0  # distance in RGB from which a pixel has none of the colours
LEAST = 0.08  # share of a cell that an object's colour covers
ALIKE = 0.55  # least intersection over union with a silhouette
_PAIR = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(KINDS)})s?\b")


@dataclass(frozen=True)
class Seen:
    """An object in an image. `kind` is "" if its silhouette is none of the world's."""

    kind: str
    color: str
    cell: int


def read_image(image: PIL.Image.Image) -> list[Seen]:
    """The objects in an image, at most one in each cell."""
    small = image.convert("RGB").resize((PIXELS, PIXELS), PIL.Image.Resampling.BILINEAR)
    values = np.asarray(small, np.float32)
    distances = np.stack([np.linalg.norm(values - np.array(c, np.float32), axis=-1) for c in COLORS.values()])
    nearest = np.where(distances.min(0) < FAR, distances.argmin(0), -1)
    side, found = PIXELS // GRID, []
    for cell in range(GRID * GRID):
        row, column = divmod(cell, GRID)
        part = nearest[row * side : (row + 1) * side, column * side : (column + 1) * side]
        counts = [(part == i).mean() for i in range(len(COLORS))]
        best = int(np.argmax(counts))
        if counts[best] >= LEAST:
            found.append(Seen(_kind(part == best), list(COLORS)[best], cell))
    return found


@cache
def _outlines() -> np.ndarray:
    """Silhouettes, each cut to its box, bool [K, side, side]."""
    return np.stack([_cut(shape(kind, 96) > 0.5) for kind in KINDS])


def _cut(mask: np.ndarray) -> np.ndarray:
    """A mask cut to its box and resized, bool."""
    rows, columns = np.nonzero(mask)
    part = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    image = PIL.Image.fromarray((part * 255).astype(np.uint8)).resize((_SHAPE, _SHAPE), PIL.Image.Resampling.BOX)
    return np.asarray(image) > 127


def _kind(mask: np.ndarray) -> str:
    own, known = _cut(mask), _outlines()
    alike = (own & known).sum((1, 2)) / np.maximum((own | known).sum((1, 2)), 1)
    return KINDS[int(alike.argmax())] if alike.max() >= ALIKE else ""


def score_image(seen: Sequence[Seen], scene: Scene) -> dict[str, tuple[int, int]]:
    """Counts of what an image has of a scene, each with what it is out of."""
    asked = [(o.attributes.kind, o.attributes.color, o.cell) for o in scene.objects]
    found = [(s.kind, s.color, s.cell) for s in seen]
    number = len(asked)

    def common(*fields: int) -> int:
        one, other = (Counter(tuple(entry[i] for i in fields) for entry in entries) for entries in (asked, found))
        return (one & other).total()

    return {
        "found_kind_color": (common(0, 1), number),
        "found_kind": (common(0), number),
        "found_color": (common(1), number),
        "right_cell": (common(0, 1, 2), number),
        "extras": (max(len(found) - number, 0), number),
    }


def score_text(text: str, scene: Scene) -> dict[str, tuple[int, int]]:
    """Twice the objects that a text names rightly, out of those that it names and those that there are (an F1)."""
    named = Counter(_PAIR.findall(text.lower()))
    there = Counter((o.attributes.color, o.attributes.kind) for o in scene.objects)
    return {"objects_f1": (2 * (named & there).total(), named.total() + there.total())}
