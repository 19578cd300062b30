"""How things, places and grounds are called: the lexicon that the grammar writes with and the parser reads by."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from ..kinds import KINDS
from ..scene import COLORS, Scene, SceneObject
from .words import a, chance, choose

ATTRIBUTES = ("size", "color", "texture", "part", "glyph")
NOTHING = {"texture": "plain", "part": "none", "glyph": ""}  # what an object has of it if it has none

COLOR_WORDS = {color: (color,) for color in COLORS} | {"gray": ("gray", "grey")}
SIZE_WORDS = {"small": ("small", "little"), "big": ("big", "large")}
TEXTURE_WORDS = {
    "plain": ("plain",), "striped": ("striped", "stripy"), "dotted": ("dotted", "spotted"),
    "checked": ("checked", "checkered"),
}  # fmt: skip
TEXTURE_NOUNS = {"striped": ("stripes",), "dotted": ("dots", "spots"), "checked": ("checks",)}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "higher up than"),
    "below": ("below", "under", "underneath", "lower down than"),
    "inside": ("inside",),
    "behind": ("behind", "partly hidden by", "half hidden behind"),
}
NEVER_FIRST = ("higher up than", "lower down than", "partly hidden by")  # awkward at the start of a sentence
GROUND_WORDS = {
    "meadow": ("in a meadow", "in the meadow", "on the grass", "on a grassy meadow"),
    "beach": ("on the beach", "at the beach", "on a sandy beach", "on the sand"),
    "snow": ("in the snow", "on snowy ground", "on the snow"),
    "night": ("under the stars", "in the dark", "under the night sky", "under a dark sky"),
    "sea": ("at sea", "on the sea", "on the water", "out at sea"),
    "room": ("in a room", "in the room", "indoors"),
}
CELL_NAMES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
CELL_WORDS = {
    "top left": ("at the top left", "in the top left corner", "in the upper left corner"),
    "top": ("at the top", "at the top in the middle"),
    "top right": ("at the top right", "in the top right corner", "in the upper right corner"),
    "left": ("on the left", "on the left side"),
    "middle": ("in the middle", "in the center"),
    "right": ("on the right", "on the right side"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left corner"),
    "bottom": ("at the bottom", "at the bottom in the middle"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right corner"),
}
LIVING = ("animal", "person")


class Fact(NamedTuple):
    """Something that a text states.

    Attributes:
        name: "object", "color", "texture", "part", "glyph", "size", "cell", "relation", "ground" or "count".
        object: index of the object in the scene (or of the mention, where a text was parsed); None for ground and
            count.
        value: what is said: the kind, the colour, ..., the name of the cell, the relation, the number as digits.
        other: for a relation, the object that `object` is left of, inside, ...
    """

    name: str
    obj: int | None
    value: str
    other: int | None = None


def attribute(obj: SceneObject, name: str) -> str:
    """The value of one of `ATTRIBUTES`."""
    return obj.size if name == "size" else getattr(obj.attributes, name)


def holds(fact: Fact, scene: Scene) -> bool:
    """Whether it is true of the scene."""
    if fact.name == "ground":
        return scene.ground == fact.value
    if fact.name == "count":
        return str(len(scene.objects)) == fact.value
    if fact.obj is None or not 0 <= fact.obj < len(scene.objects):
        return False
    obj = scene.objects[fact.obj]
    if fact.name == "object":
        return obj.attributes.kind == fact.value
    if fact.name == "cell":
        return CELL_NAMES[obj.cell] == fact.value
    if fact.name == "relation":
        return fact.other is not None and fact.value in scene.relation(fact.obj, fact.other)
    return attribute(obj, fact.name) == fact.value


def living(obj: SceneObject) -> bool:
    """Whether it is someone rather than something: it walks, wears and is met."""
    return KINDS[obj.attributes.kind].group in LIVING


def noun(obj: SceneObject, stated: Collection[str], rng: np.random.Generator, plural: bool = False) -> str:
    """For instance "big striped red fox with a crown", without an article.

    Args:
        obj: the object.
        stated: the `ATTRIBUTES` that the phrase states; attributes without a value ("none", no glyph) are left out.
        rng: chooses among equivalent words.
        plural: "big red foxes with crowns".
    """
    attributes = obj.attributes
    before = [choose(rng, SIZE_WORDS[obj.size])] if "size" in stated else []
    tint = [choose(rng, COLOR_WORDS[attributes.color])] if "color" in stated else []
    after = []
    if "texture" in stated:
        if attributes.texture in TEXTURE_NOUNS and chance(rng, 0.25):
            after.append(choose(rng, TEXTURE_NOUNS[attributes.texture]))
        else:
            tint.insert(int(rng.random() * 2), choose(rng, TEXTURE_WORDS[attributes.texture]))
    if "part" in stated and attributes.part != "none":
        after.append(f"{attributes.part}s" if plural else f"a {attributes.part}")
    kind = KINDS[attributes.kind]
    tail = _tail(after, attributes.glyph if "glyph" in stated else "", obj, rng)
    return " ".join([*before, *tint, kind.plural if plural else kind.name]) + tail


def _tail(after: list[str], glyph: str, obj: SceneObject, rng: np.random.Generator) -> str:
    """For instance " with stripes, a crown and the letter K"."""
    if glyph and (not after or chance(rng, 0.5)):
        marked = choose(rng, (f"marked {glyph}", f"with {glyph_noun(glyph)}", f"with {a(glyph)} on it"))
        if not after:
            return f" {marked}"
        if marked.startswith("with"):
            marked = marked.removeprefix("with ")
    elif glyph:
        marked = glyph_noun(glyph)
    else:
        marked = ""
    if not after:
        return ""
    wears = len(after) == 1 and after[0].startswith("a ") and not after[0].endswith("flag") and living(obj)
    if wears and (not marked or marked.startswith("marked")) and chance(rng, 0.5):
        return f" wearing {after[0]}" + (f" and {marked}" if marked else "")
    items = [*after, marked] if marked and not marked.startswith("marked") else after
    joined = " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]
    return f" with {joined}" + (f", {marked}" if marked.startswith("marked") else "")


def glyph_noun(glyph: str) -> str:
    """For instance "the letter K", "the number 7"."""
    return f"the {'number' if glyph.isdigit() else 'letter'} {glyph}"


def cell_phrase(obj: SceneObject, rng: np.random.Generator) -> str:
    """For instance "at the top left"."""
    return choose(rng, CELL_WORDS[CELL_NAMES[obj.cell]])


def ground_phrase(ground: str, rng: np.random.Generator) -> str:
    """For instance "on the beach"."""
    return choose(rng, GROUND_WORDS[ground])


def distinguishing(scene: Scene, index: int, allowed: Collection[str], rng: np.random.Generator,
                   start: Collection[str] = ()) -> tuple[str, ...] | None:  # fmt: skip
    """Attributes that, with its kind, single out object number `index`; as few as a random order finds.

    Args:
        scene: where it stands.
        index: which object.
        allowed: attributes that may be used.
        rng: the order in which they are tried.
        start: attributes to use in any case.

    Returns:
        The attributes; None if no choice of them is enough.
    """
    obj = scene.objects[index]
    rivals = [t for i, t in enumerate(scene.objects) if i != index and t.attributes.kind == obj.attributes.kind]
    chosen = list(start)
    rivals = [t for t in rivals if all(attribute(t, n) == attribute(obj, n) for n in chosen)]
    if not rivals:
        return tuple(chosen)
    order = [n for n in allowed if n not in chosen and attribute(obj, n) != NOTHING.get(n)]
    for turn in range(len(order)):
        other = turn + int(rng.random() * (len(order) - turn))
        order[turn], order[other] = order[other], order[turn]
    for name in order:
        fewer = [t for t in rivals if attribute(t, name) == attribute(obj, name)]
        if len(fewer) < len(rivals):
            chosen.append(name)
            rivals = fewer
        if not rivals:
            return tuple(chosen)
    return None


def the(scene: Scene, index: int, rng: np.random.Generator, allowed: Collection[str] = ATTRIBUTES,
        start: Collection[str] = ()) -> str | None:  # fmt: skip
    """For instance "the red fox": a phrase that can only mean object number `index`; None if there is none."""
    chosen = distinguishing(scene, index, allowed, rng, start)
    return None if chosen is None else f"the {noun(scene.objects[index], chosen, rng)}"
