"""What can happen in a story: each event changes the stage and says so in words that determine the change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from .kinds import KINDS
from .language.phrases import ATTRIBUTES, CELL_NAMES, CELL_WORDS, TEXTURE_NOUNS, glyph_noun, living, noun
from .language.words import a, chance, choose, listed, say
from .sampling import random_attributes
from .scene import COLORS, GLYPHS, GRID, GROUNDS, PARTS, TEXTURES, Attributes, Scene, SceneObject

LOOKS = ("kind", "color", "texture", "part", "glyph")
STEPS = {"left": -1, "right": 1, "up": -GRID, "down": GRID}
SIDES = {"left": "to the left of", "right": "to the right of", "up": "above", "down": "below"}
DESTINATIONS = {"left": "left side", "right": "right side"}  # "goes to the left" would be a step
LANDS = {
    "meadow": ("to a meadow", "to the meadow"), "beach": ("to the beach", "down to the beach"),
    "snow": ("into the snow", "to a snowy land"), "sea": ("out to sea", "onto the water"),
    "room": ("into a room", "indoors"), "night": ("out into the night", "into the dark night"),
}  # fmt: skip
MOST_THINGS = 4


@dataclass
class Stage:
    """The state of a story.

    Attributes:
        objects: what is there. Characters have names; no two objects are of one kind, so "the tree" is clear.
        ground: the background.
        seed: of the drawing, the same all along.
        known: by name, which of `LOOKS` the text tells.
        away: characters that have left.
    """

    objects: list[SceneObject]
    ground: str
    seed: int
    known: dict[str, set[str]] = field(default_factory=dict)
    away: list[SceneObject] = field(default_factory=list)

    def scene(self) -> Scene:
        """What is to be drawn now."""
        return Scene(tuple(self.objects), self.ground, self.seed)

    def unsaid(self) -> tuple[int, ...]:
        """Return the numbers of the objects whose attributes the text has not stated."""
        return tuple(i for i, t in enumerate(self.objects) if t.name and not self.known[t.name].issuperset(LOOKS))

    def characters(self) -> list[int]:
        """Numbers of the objects with names."""
        return [i for i, t in enumerate(self.objects) if t.name]

    def free(self) -> list[int]:
        """Cells where nothing stands."""
        taken = {t.cell for t in self.objects}
        return [c for c in range(GRID * GRID) if c not in taken]

    def calls(self, index: int) -> str:
        """For instance "Mila" or "the tree"."""
        obj = self.objects[index]
        return obj.name or f"the {obj.attributes.kind}"

    def change(self, index: int, **attributes: str) -> None:
        """Change attributes of a character that the text states."""
        self.objects[index] = self.objects[index].with_attributes(**attributes)
        self.known[self.objects[index].name] |= attributes.keys()


Event = Callable[[Stage, int, np.random.Generator], str | None]
"""Changes the stage around character number `index` and says how, without a full stop; None if it cannot happen."""


def neighbour(cell: int, step: str) -> int | None:
    """The cell one step "left", "right", "up" or "down"; None beyond the edge."""
    if step in ("left", "right") and (cell + STEPS[step]) // GRID != cell // GRID:
        return None
    found = cell + STEPS[step]
    return found if 0 <= found < GRID * GRID else None


def _verb(obj: SceneObject, rng: np.random.Generator) -> str:
    return choose(rng, ("goes", "moves", "walks", "runs") if living(obj) else ("goes", "moves"))


def _goes(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    obj = stage.objects[index]
    cell = choose(rng, stage.free())
    name = CELL_NAMES[cell]
    stage.objects[index] = replace(obj, cell=cell)
    return f"{obj.name} {_verb(obj, rng)} to the {DESTINATIONS.get(name, name)}"


def _steps(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    obj = stage.objects[index]
    ways = [s for s in STEPS if neighbour(obj.cell, s) in stage.free()]
    if not ways:
        return None
    step = choose(rng, ways)
    cell = neighbour(obj.cell, step)
    assert cell is not None
    stage.objects[index] = replace(obj, cell=cell)
    way = f"to the {step}" if step in ("left", "right") else step
    return say(rng, "{name} [goes one step {way}|moves one step {way}]", name=obj.name, way=way)


def _joins(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    obj = stage.objects[index]
    others = [i for i in range(len(stage.objects)) if i != index]
    if not others:
        return None
    other = choose(rng, others)
    sides = [s for s in STEPS if neighbour(stage.objects[other].cell, s) in stage.free()]
    if not sides:
        return None
    side = choose(rng, sides)
    cell = neighbour(stage.objects[other].cell, side)
    assert cell is not None
    stage.objects[index] = replace(obj, cell=cell)
    where, who = SIDES[side], stage.calls(other)
    name, close = obj.name, "just " if side in ("up", "down") else ""
    if stage.objects[other].name and chance(rng, 0.5):
        return say(rng, "{name} meets {who} and [stops|stands] {where} {who}", name=name, who=who, where=close + where)
    if close or chance(rng, 0.4):
        return f"{name} {_verb(obj, rng)} over and stands {close}{where} {who}"
    return f"{name} {_verb(obj, rng)} {where} {who}"


def _swaps(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    others = [i for i in stage.characters() if i != index]
    if not others:
        return None
    other = choose(rng, others)
    one, two = stage.objects[index], stage.objects[other]
    stage.objects[index], stage.objects[other] = replace(one, cell=two.cell), replace(two, cell=one.cell)
    return say(rng, "{a} and {b} [swap|change|trade] places", a=one.name, b=two.name)


def _grows(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    obj = stage.objects[index]
    if obj.size == "big":
        if obj.attributes.glyph:
            return None  # too small to be read
        stage.objects[index] = replace(obj, size="small")
        return say(rng, "{name} [becomes small|gets small|shrinks and is small now]", name=obj.name)
    stage.objects[index] = replace(obj, size="big")
    return say(rng, "{name} [becomes big|grows big|grows and is big now]", name=obj.name)


def _recolors(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    obj = stage.objects[index]
    color = choose(rng, [c for c in COLORS if c != obj.attributes.color])
    stage.change(index, color=color)
    return say(rng, "{name} [turns|becomes] {color}", name=obj.name, color=color)


def _retextures(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    obj = stage.objects[index]
    texture = choose(rng, [t for t in TEXTURES if t != obj.attributes.texture])
    stage.change(index, texture=texture)
    if texture == "plain":
        return f"{obj.name} loses the {choose(rng, TEXTURE_NOUNS[obj.attributes.texture])}"
    return say(rng, "{name} [becomes {texture}|gets {nouns}]", name=obj.name, texture=texture,
               nouns=choose(rng, TEXTURE_NOUNS[texture]))  # fmt: skip


def _dresses(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    obj = stage.objects[index]
    old = obj.attributes.part
    if old != "none" and chance(rng, 0.5):
        stage.change(index, part="none")
        return f"{obj.name} {'puts down' if old == 'flag' else 'takes off'} the {old}"
    part = choose(rng, [p for p in PARTS[1:] if p != old])
    stage.change(index, part=part)
    if old != "none":
        return f"{obj.name} swaps the {old} for a {part}"
    return f"{obj.name} {'picks up' if part == 'flag' else 'puts on'} a {part}"


def _letters(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    obj = stage.objects[index]
    if obj.size == "small":
        return None
    glyph = choose(rng, [g for g in GLYPHS if g != obj.attributes.glyph])
    stage.change(index, glyph=glyph)
    if obj.attributes.glyph:
        return say(rng, "{name} [changes to|now has] {glyph}", name=obj.name, glyph=glyph_noun(glyph))
    return say(rng, "{name} [picks up|finds|gets] {glyph}", name=obj.name, glyph=glyph_noun(glyph))


def _travels(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    """Everyone goes elsewhere; what has no name stays behind, unless only the weather or the hour changes."""
    changes = {"night": "night falls", "snow": "it begins to snow"}
    outside = [g for g in changes if g != stage.ground]
    if stage.ground not in ("room", "night") and outside and chance(rng, 0.3):
        stage.ground = choose(rng, outside)
        return changes[stage.ground]
    stage.ground = choose(rng, [g for g in GROUNDS if g != stage.ground])
    names = [stage.calls(i) for i in stage.characters()]
    left = [stage.calls(i) for i in range(len(stage.objects)) if not stage.objects[i].name]
    stage.objects = [t for t in stage.objects if t.name]
    who = names[0] if len(names) == 1 else choose(rng, (listed(names), "they all" if len(names) > 2 else "they both"))
    verb = choose(rng, ("goes", "travels") if len(names) == 1 else ("go", "travel"))
    stays = f", and {listed(left)} {'stays' if len(left) == 1 else 'stay'} behind" if left else ""
    return f"{who} {verb} {choose(rng, LANDS[stage.ground])}{stays}"


def _leaves(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    if len(stage.characters()) < 2:
        return None
    obj = stage.objects.pop(index)
    stage.away.append(obj)
    return say(rng, "{name} [goes home|leaves|goes away]", name=obj.name)


def _returns(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    if not stage.away:
        return None
    obj = stage.away.pop(int(rng.random() * len(stage.away)))
    cell = choose(rng, stage.free())
    stage.objects.append(replace(obj, cell=cell))
    where = choose(rng, CELL_WORDS[CELL_NAMES[cell]])
    return say(rng, "{name} [comes back and stands|comes back and is|is back,] {where}", name=obj.name, where=where)


def _appears(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    """Add a new object; the text states its attributes."""
    if len(stage.objects) >= MOST_THINGS:
        return None
    obj = prop(stage, rng)
    stage.objects.append(obj)
    where = choose(rng, CELL_WORDS[CELL_NAMES[obj.cell]])
    phrase = a(noun(obj, described(obj), rng))
    return say(rng, "[{phrase} appears {where}|now there is {phrase} {where}]", phrase=phrase, where=where)


def _vanishes(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    props = [i for i, t in enumerate(stage.objects) if not t.name]
    if not props:
        return None
    obj = stage.objects.pop(choose(rng, props))
    return say(rng, "the {kind} [disappears|is gone]", kind=obj.attributes.kind)


EVENTS: dict[Event, int] = {
    _goes: 4, _steps: 3, _joins: 5, _swaps: 3, _grows: 2, _recolors: 3, _retextures: 2, _dresses: 3, _letters: 2,
    _travels: 2, _leaves: 1, _returns: 4, _appears: 1, _vanishes: 1,
}  # fmt: skip
"""What can happen, and how often it is tried."""
MOVES = (_goes, _steps, _joins, _swaps, _leaves, _returns, _travels)  # one of them a frame
WEIGHTED = tuple(event for event, weight in EVENTS.items() for _ in range(weight))


def prop(stage: Stage, rng: np.random.Generator) -> SceneObject:
    """Something without a name, of a kind that is not there yet, in a free cell."""
    size = "small" if chance(rng, 0.3) else "big"
    attributes = fresh_attributes(stage, rng, size, False)
    return SceneObject(attributes, choose(rng, stage.free()), size)


def fresh_attributes(stage: Stage, rng: np.random.Generator, size: str, character: bool) -> Attributes:
    """Return random attributes of a kind that is not on the stage; characters are mostly alive, and rich in detail."""
    used = {t.attributes.kind for t in (*stage.objects, *stage.away)}
    alive = character and chance(rng, 0.85)
    kinds = tuple(k.name for k in KINDS.values() if k.name not in used and (k.group in ("animal", "person")) >= alive)
    if character:
        return random_attributes(rng, size=size, kinds=kinds, textured=0.6, with_part=0.35, with_glyph=0.4)
    return random_attributes(rng, size=size, kinds=kinds, textured=0.2, with_part=0.0, with_glyph=0.1)


def described(obj: SceneObject) -> tuple[str, ...]:
    """Return the names of the attributes that a text states of an object: those without the default value."""
    names = [n for n in ATTRIBUTES if n not in ("size", "texture")]
    names += ["texture"] if obj.attributes.texture != "plain" else []
    return tuple(names + (["size"] if obj.size == "small" else []))
