"""Chance: looks, scenes, and which split each scene belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .draw import boxes, visible
from .kinds import KINDS
from .scene import COLORS, GLYPHS, GRID, GROUNDS, PARTS, TEXTURES, Look, Scene, Thing

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
HELD_OUT = 5  # percent of all scenes in "val", and as many in "test"

SMALL = 0.35  # share of things
TEXTURED, WITH_PART, WITH_GLYPH = 0.4, 0.2, 0.3  # shares; glyphs: of big things
HOSTING = 0.3  # share of scenes of two or more things in which one is tried inside or behind another
JITTER = {"small": 0.15, "big": 0.02}  # of offsets, in cells
LEAST_SEEN, MOST_SEEN = 0.5, 0.85  # share of a thing behind another that is seen
_CHECKED = 96  # pixels at which that share is measured


def split_of(scene: Scene) -> Split:
    """The split that a scene belongs to, by its content alone: the things' looks, cells, sizes, places and hosts in any
    order; not the ground, the offsets, the names, nor the seed of the drawing. So two splits share no arrangement.
    """
    words = []
    for thing in scene.things:
        host = "" if thing.host is None else scene.things[thing.host].look.kind
        look = thing.look
        traits = (look.kind, look.color, look.texture, look.part, look.glyph)
        words.append(" ".join((*traits, str(thing.cell), thing.size, thing.place, host)))
    digest = hashlib.blake2b("\n".join(sorted(words)).encode(), digest_size=8).digest()
    percent = int.from_bytes(digest, "big") % 100
    if percent < 2 * HELD_OUT:
        return "val" if percent < HELD_OUT else "test"
    return "train"


def scene_rng(seed: int, split: Split, index: int) -> np.random.Generator:
    """The source of chance for the scene number `index` of a split; the same for the same three, and no other."""
    return np.random.default_rng((seed, SPLITS.index(split), index))


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def random_look(
    rng: np.random.Generator,
    *,
    size: str = "big",
    kinds: Sequence[str] | None = None,
    textured: float = TEXTURED,
    with_part: float = WITH_PART,
    with_glyph: float = WITH_GLYPH,
) -> Look:
    """A look by chance.

    Args:
        rng: source of chance.
        size: of the thing that will look so; only big ones get a glyph.
        kinds: names to choose from; all if not given.
        textured: how likely it is to have a texture.
        with_part: how likely it is to wear something.
        with_glyph: how likely it is to have a glyph, if big; a quarter of that if it wears something.
    """
    part = _pick(rng, PARTS[1:]) if rng.random() < with_part else "none"
    lettered = size == "big" and rng.random() < with_glyph * (1.0 if part == "none" else 0.25)
    return Look(
        kind=_pick(rng, kinds or tuple(KINDS)),
        color=_pick(rng, COLORS),
        texture=_pick(rng, TEXTURES[1:]) if rng.random() < textured else "plain",
        part=part,
        glyph=_pick(rng, GLYPHS) if lettered else "",
    )


def inside(rng: np.random.Generator, things: Sequence[Thing], host: int, look: Look) -> Thing | None:
    """A small thing of this look inside thing number `host`; None if that is not hollow and big, wears something (which
    leaves less room), has a glyph, or holds something already.
    """
    around = things[host]
    taken = any(thing.place == "inside" and thing.host == host for thing in things)
    dressed = around.look.glyph or around.look.part != "none"
    if not KINDS[around.look.kind].hollow or around.size != "big" or dressed or taken:
        return None
    return Thing(look, around.cell, "small", around.offset, "inside", host)


def behind(rng: np.random.Generator, things: Sequence[Thing], host: int, look: Look) -> Thing | None:
    """A small thing of this look partly hidden by thing number `host`; None if no place is found at which it is neither
    hidden too much or too little, nor cut off, nor in the way of other things. Hosts are big and not hollow.
    """
    front = things[host]
    if KINDS[front.look.kind].hollow or front.size != "big":
        return None
    for _ in range(6):
        side, lift = rng.choice((-1.0, 1.0)) * rng.uniform(0.3, 0.4), rng.uniform(-0.4, 0.15)
        offset = (float(np.clip(front.offset[0] + side, -0.42, 0.42)), float(front.offset[1] + lift))
        thing = Thing(look, front.cell, "small", offset, "behind", host)
        scene = Scene((*things, thing))
        *others, mine = boxes(scene, _CHECKED)
        clear = min(mine) > 0 and max(mine) < _CHECKED
        clear &= not any(i != host and _touch(mine, box) for i, box in enumerate(others))
        if clear and LEAST_SEEN <= visible(scene, _CHECKED)[-1] <= MOST_SEEN:
            return thing
    return None


def _touch(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _fresh(rng: np.random.Generator, used: Sequence[Thing], size: str, **shares: float) -> Look:
    """A look of a kind that is not in the scene yet; one time in eight any kind, but not the same colour as well."""
    kinds = {thing.look.kind for thing in used}
    free = [name for name in KINDS if name not in kinds]
    while True:
        look = random_look(rng, size=size, kinds=None if rng.random() < 1 / 8 else free, **shares)
        if (look.kind, look.color) not in {(thing.look.kind, thing.look.color) for thing in used}:
            return look


def _hosted(rng: np.random.Generator, things: list[Thing]) -> Thing | None:
    """Something inside or behind one of the things, by chance."""
    hollow = tuple(name for name, kind in KINDS.items() if kind.hollow)
    host = int(rng.integers(len(things)))
    if rng.random() < 0.5:  # hollow things are rare, so one is put there
        others = {(t.look.kind, t.look.color) for t in things[:host] + things[host + 1 :]}
        look = random_look(rng, kinds=hollow, with_part=0.0, with_glyph=0.0)
        if (look.kind, look.color) in others:
            return None
        things[host] = Thing(look, things[host].cell, "big", things[host].offset)
        return inside(rng, things, host, _fresh(rng, things, "small"))
    return behind(rng, things, host, _fresh(rng, things, "small"))


def _any_scene(rng: np.random.Generator, things: tuple[int, int]) -> Scene:
    number = int(rng.integers(things[0], things[1] + 1))
    hosting = number > 1 and rng.random() < HOSTING
    alone = number - 1 if hosting else number
    found: list[Thing] = []
    for cell in rng.permutation(GRID * GRID)[:number].tolist()[:alone]:
        size = "small" if rng.random() < SMALL else "big"
        right, down = (round(float(v), 3) for v in rng.uniform(-1, 1, 2) * JITTER[size])
        found.append(Thing(_fresh(rng, found, size), cell, size, (right, down)))
    if hosting:
        added = _hosted(rng, found)
        if added is None:
            size = "small" if rng.random() < SMALL else "big"
            free = [cell for cell in range(GRID * GRID) if cell not in {thing.cell for thing in found}]
            added = Thing(_fresh(rng, found, size), free[int(rng.integers(len(free)))], size)
        found.append(added)
    return Scene(tuple(found), _pick(rng, GROUNDS), int(rng.integers(2**31)))


def check_things(things: tuple[int, int]) -> None:
    """Refuse what is not a range within 1 to 9."""
    if not 1 <= things[0] <= things[1] <= GRID * GRID:
        raise ValueError(f"things={things}: give the fewest and the most, within 1 to {GRID * GRID}")


def random_scene(rng: np.random.Generator, *, things: tuple[int, int] = (1, 5), split: Split | None = None) -> Scene:
    """A scene by chance: kinds are mostly distinct, looks always differ in kind or colour, no two things share a cell
    but those inside or behind each other.

    Args:
        rng: source of chance, for instance `scene_rng(...)`.
        things: the fewest and the most things.
        split: if given, drawn anew until the scene belongs to it.

    Raises:
        ValueError: `things` is not a range within 1 to 9.
    """
    check_things(things)
    while True:
        scene = _any_scene(rng, things)
        if split is None or split_of(scene) == split:
            return scene
