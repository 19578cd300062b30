"""Random attributes, objects and scenes, and the split that each scene belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .draw import boxes, visible
from .kinds import KINDS
from .scene import COLORS, GLYPHS, GRID, GROUNDS, PARTS, TEXTURES, Attributes, Scene, SceneObject

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
HELD_OUT = 5  # percent of all scenes in "val", and as many in "test"

SMALL = 0.35  # share of objects
TEXTURED, WITH_PART, WITH_GLYPH = 0.4, 0.2, 0.3  # shares; glyphs: of big objects
HOSTING = 0.3  # share of scenes of two or more objects in which one is tried inside or behind another
JITTER = {"small": 0.15, "big": 0.02}  # of offsets, in cells
LEAST_SEEN, MOST_SEEN = 0.5, 0.85  # share of an object behind another that is seen
_CHECKED = 96  # pixels at which that share is measured


def split_of(scene: Scene) -> Split:
    """Return the split of a scene.

    It depends on the objects' attributes, cells, sizes, places and hosts in any order, and not on the ground, the
    offsets, the names or the seed of the drawing. So two splits share no arrangement.
    """
    words = []
    for obj in scene.objects:
        host = "" if obj.host is None else scene.objects[obj.host].attributes.kind
        attributes = obj.attributes
        traits = (attributes.kind, attributes.color, attributes.texture, attributes.part, attributes.glyph)
        words.append(" ".join((*traits, str(obj.cell), obj.size, obj.place, host)))
    digest = hashlib.blake2b("\n".join(sorted(words)).encode(), digest_size=8).digest()
    percent = int.from_bytes(digest, "big") % 100
    if percent < 2 * HELD_OUT:
        return "val" if percent < HELD_OUT else "test"
    return "train"


def scene_rng(seed: int, split: Split, index: int) -> np.random.Generator:
    """Return the random generator of scene number `index` of a split: always the same for the same three arguments."""
    return np.random.default_rng((seed, SPLITS.index(split), index))


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def random_attributes(
    rng: np.random.Generator,
    *,
    size: str = "big",
    kinds: Sequence[str] | None = None,
    textured: float = TEXTURED,
    with_part: float = WITH_PART,
    with_glyph: float = WITH_GLYPH,
) -> Attributes:
    """Return random attributes.

    Args:
        rng: random generator.
        size: of the object that they are for; only big ones get a glyph.
        kinds: names to choose from; all if not given.
        textured: how likely it is to have a texture.
        with_part: how likely it is to wear something.
        with_glyph: how likely it is to have a glyph, if big; a quarter of that if it wears something.
    """
    part = _pick(rng, PARTS[1:]) if rng.random() < with_part else "none"
    lettered = size == "big" and rng.random() < with_glyph * (1.0 if part == "none" else 0.25)
    return Attributes(
        kind=_pick(rng, kinds or tuple(KINDS)),
        color=_pick(rng, COLORS),
        texture=_pick(rng, TEXTURES[1:]) if rng.random() < textured else "plain",
        part=part,
        glyph=_pick(rng, GLYPHS) if lettered else "",
    )


def inside(
    rng: np.random.Generator, objects: Sequence[SceneObject], host: int, attributes: Attributes
) -> SceneObject | None:
    """Return a small object of these attributes inside object number `host`; None if that is not hollow and big, wears
    something (which leaves less room), has a glyph, or holds something already.
    """
    around = objects[host]
    taken = any(obj.place == "inside" and obj.host == host for obj in objects)
    dressed = around.attributes.glyph or around.attributes.part != "none"
    if not KINDS[around.attributes.kind].hollow or around.size != "big" or dressed or taken:
        return None
    return SceneObject(attributes, around.cell, "small", around.offset, "inside", host)


def behind(
    rng: np.random.Generator, objects: Sequence[SceneObject], host: int, attributes: Attributes
) -> SceneObject | None:
    """Return a small object of these attributes partly hidden by object number `host`; None: there is no place for it.

    In its place it is not hidden too much or too little, not cut off, and not in the way of other objects. Hosts are
    big and not hollow.
    """
    front = objects[host]
    if KINDS[front.attributes.kind].hollow or front.size != "big":
        return None
    for _ in range(6):
        side, lift = rng.choice((-1.0, 1.0)) * rng.uniform(0.3, 0.4), rng.uniform(-0.4, 0.15)
        offset = (float(np.clip(front.offset[0] + side, -0.42, 0.42)), float(front.offset[1] + lift))
        obj = SceneObject(attributes, front.cell, "small", offset, "behind", host)
        scene = Scene((*objects, obj))
        *others, mine = boxes(scene, _CHECKED)
        clear = min(mine) > 0 and max(mine) < _CHECKED
        clear &= not any(i != host and _touch(mine, box) for i, box in enumerate(others))
        if clear and LEAST_SEEN <= visible(scene, _CHECKED)[-1] <= MOST_SEEN:
            return obj
    return None


def _touch(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _fresh(rng: np.random.Generator, used: Sequence[SceneObject], size: str, **shares: float) -> Attributes:
    """Return random attributes of a kind that is new in the scene; one time in eight of any kind in a new colour."""
    kinds = {obj.attributes.kind for obj in used}
    free = [name for name in KINDS if name not in kinds]
    while True:
        attributes = random_attributes(rng, size=size, kinds=None if rng.random() < 1 / 8 else free, **shares)
        if (attributes.kind, attributes.color) not in {(obj.attributes.kind, obj.attributes.color) for obj in used}:
            return attributes


def _hosted(rng: np.random.Generator, objects: list[SceneObject]) -> SceneObject | None:
    """Return a random object inside or behind one of the objects; None: there is no place for one."""
    hollow = tuple(name for name, kind in KINDS.items() if kind.hollow)
    host = int(rng.integers(len(objects)))
    if rng.random() < 0.5:  # hollow objects are rare, so one is put there
        others = {(t.attributes.kind, t.attributes.color) for t in objects[:host] + objects[host + 1 :]}
        attributes = random_attributes(rng, kinds=hollow, with_part=0.0, with_glyph=0.0)
        if (attributes.kind, attributes.color) in others:
            return None
        objects[host] = SceneObject(attributes, objects[host].cell, "big", objects[host].offset)
        return inside(rng, objects, host, _fresh(rng, objects, "small"))
    return behind(rng, objects, host, _fresh(rng, objects, "small"))


def _any_scene(rng: np.random.Generator, objects: tuple[int, int]) -> Scene:
    number = int(rng.integers(objects[0], objects[1] + 1))
    hosting = number > 1 and rng.random() < HOSTING
    alone = number - 1 if hosting else number
    found: list[SceneObject] = []
    for cell in rng.permutation(GRID * GRID)[:number].tolist()[:alone]:
        size = "small" if rng.random() < SMALL else "big"
        right, down = (round(float(v), 3) for v in rng.uniform(-1, 1, 2) * JITTER[size])
        found.append(SceneObject(_fresh(rng, found, size), cell, size, (right, down)))
    if hosting:
        added = _hosted(rng, found)
        if added is None:
            size = "small" if rng.random() < SMALL else "big"
            free = [cell for cell in range(GRID * GRID) if cell not in {obj.cell for obj in found}]
            added = SceneObject(_fresh(rng, found, size), free[int(rng.integers(len(free)))], size)
        found.append(added)
    return Scene(tuple(found), _pick(rng, GROUNDS), int(rng.integers(2**31)))


def check_objects(objects: tuple[int, int]) -> None:
    """Raise a `ValueError` if `objects` is not a range within 1 to 9."""
    if not 1 <= objects[0] <= objects[1] <= GRID * GRID:
        raise ValueError(f"objects={objects}: give the fewest and the most, within 1 to {GRID * GRID}")


def random_scene(rng: np.random.Generator, *, objects: tuple[int, int] = (1, 5), split: Split | None = None) -> Scene:
    """Return a random scene: kinds are mostly distinct, attributes always differ in kind or colour, and no two objects
    share a cell but those inside or behind each other.

    Args:
        rng: random generator, for instance `scene_rng(...)`.
        objects: the fewest and the most objects.
        split: if given, drawn anew until the scene belongs to it.

    Raises:
        ValueError: `objects` is not a range within 1 to 9.
    """
    check_objects(objects)
    while True:
        scene = _any_scene(rng, objects)
        if split is None or split_of(scene) == split:
            return scene
