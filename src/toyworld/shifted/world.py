"""What there is in the shifted world, and its random scenes."""

from __future__ import annotations

import hashlib

import numpy as np

from ..language.words import choose
from ..sampling import HELD_OUT, Split
from ..scene import GRID, Attributes, Scene, SceneObject

Color = tuple[int, int, int]
KINDS = ("arrow", "hourglass", "key", "anchor", "bolt", "drop", "bell", "umbrella", "hammer", "bottle")
COLORS: dict[str, Color] = {
    "teal": (0, 150, 140), "maroon": (128, 10, 40), "lime": (170, 225, 20), "navy": (16, 24, 110),
    "gold": (235, 180, 10), "violet": (150, 60, 230),
}  # fmt: skip
GROUNDS = ("desert", "lava", "swamp", "city")
PLACES = ("north-west", "north", "north-east", "west", "center", "east", "south-west", "south", "south-east")
MOST = 3  # objects of a scene
JITTER = 0.04  # of an object's centre, in cells


def split_of(scene: Scene) -> Split:
    """The split of a scene, by its objects and their cells: two splits share no arrangement."""
    words = sorted(f"{o.attributes.kind} {o.attributes.color} {o.cell}" for o in scene.objects)
    digest = hashlib.blake2b("\n".join(words).encode(), digest_size=8, person=b"shifted").digest()
    percent = int.from_bytes(digest, "big") % 100
    if percent < 2 * HELD_OUT:
        return "val" if percent < HELD_OUT else "test"
    return "train"


def random_scene(rng: np.random.Generator, split: Split | None = None, objects: int | None = None) -> Scene:
    """A random scene; its objects differ in kind, and none hides another.

    Args:
        rng: random generator.
        split: the scene belongs to it; None: to any.
        objects: number of objects; None: 1 to `MOST`.
    """
    while True:
        number = int(rng.integers(1, MOST + 1)) if objects is None else objects
        cells = rng.permutation(GRID * GRID)[:number].tolist()
        kinds = [KINDS[i] for i in rng.permutation(len(KINDS))[:number].tolist()]
        found = []
        for kind, cell in zip(kinds, cells, strict=True):
            right, down = (round(float(v), 3) for v in rng.uniform(-JITTER, JITTER, 2))
            found.append(SceneObject(Attributes(kind, choose(rng, tuple(COLORS))), cell, "big", (right, down)))
        scene = Scene(tuple(found), choose(rng, GROUNDS), int(rng.integers(2**31)))
        if split is None or split_of(scene) == split:
            return scene
