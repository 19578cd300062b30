"""What can happen in a story: each event changes the stage and says so in words that determine the change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from .kinds import KINDS
from .language.phrases import ATTRIBUTES, CELL_NAMES, CELL_WORDS, TEXTURE_NOUNS, glyph_noun, living, noun
from .language.words import a, chance, choose, listed, say
from .sampling import random_look
from .scene import COLORS, GLYPHS, GRID, GROUNDS, PARTS, TEXTURES, Look, Scene, Thing

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
        things: what is there. Characters have names; no two things are of one kind, so "the tree" is clear.
        ground: the background.
        seed: of the drawing, the same all along.
        known: by name, which of `LOOKS` the text tells.
        away: characters that have left.
    """

    things: list[Thing]
    ground: str
    seed: int
    known: dict[str, set[str]] = field(default_factory=dict)
    away: list[Thing] = field(default_factory=list)

    def scene(self) -> Scene:
        """What is to be drawn now."""
        return Scene(tuple(self.things), self.ground, self.seed)

    def unsaid(self) -> tuple[int, ...]:
        """Things whose looks the text has not told."""
        return tuple(i for i, t in enumerate(self.things) if t.name and not self.known[t.name].issuperset(LOOKS))

    def characters(self) -> list[int]:
        """Numbers of the things with names."""
        return [i for i, t in enumerate(self.things) if t.name]

    def free(self) -> list[int]:
        """Cells where nothing stands."""
        taken = {t.cell for t in self.things}
        return [c for c in range(GRID * GRID) if c not in taken]

    def calls(self, index: int) -> str:
        """For instance "Mila" or "the tree"."""
        thing = self.things[index]
        return thing.name or f"the {thing.look.kind}"

    def change(self, index: int, **look: str) -> None:
        """Change a character's look; the text tells it."""
        self.things[index] = self.things[index].with_look(**look)
        self.known[self.things[index].name] |= look.keys()


Event = Callable[[Stage, int, np.random.Generator], str | None]
"""Changes the stage around character number `index` and says how, without a full stop; None if it cannot happen."""


def neighbour(cell: int, step: str) -> int | None:
    """The cell one step "left", "right", "up" or "down"; None beyond the edge."""
    if step in ("left", "right") and (cell + STEPS[step]) // GRID != cell // GRID:
        return None
    found = cell + STEPS[step]
    return found if 0 <= found < GRID * GRID else None


def _verb(thing: Thing, rng: np.random.Generator) -> str:
    return choose(rng, ("goes", "moves", "walks", "runs") if living(thing) else ("goes", "moves"))


def _goes(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    thing = stage.things[index]
    cell = choose(rng, stage.free())
    name = CELL_NAMES[cell]
    stage.things[index] = replace(thing, cell=cell)
    return f"{thing.name} {_verb(thing, rng)} to the {DESTINATIONS.get(name, name)}"


def _steps(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    thing = stage.things[index]
    ways = [s for s in STEPS if neighbour(thing.cell, s) in stage.free()]
    if not ways:
        return None
    step = choose(rng, ways)
    cell = neighbour(thing.cell, step)
    assert cell is not None
    stage.things[index] = replace(thing, cell=cell)
    way = f"to the {step}" if step in ("left", "right") else step
    return say(rng, "{name} [goes one step {way}|moves one step {way}]", name=thing.name, way=way)


def _joins(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    thing = stage.things[index]
    others = [i for i in range(len(stage.things)) if i != index]
    if not others:
        return None
    other = choose(rng, others)
    sides = [s for s in STEPS if neighbour(stage.things[other].cell, s) in stage.free()]
    if not sides:
        return None
    side = choose(rng, sides)
    cell = neighbour(stage.things[other].cell, side)
    assert cell is not None
    stage.things[index] = replace(thing, cell=cell)
    where, who = SIDES[side], stage.calls(other)
    name, close = thing.name, "just " if side in ("up", "down") else ""
    if stage.things[other].name and chance(rng, 0.5):
        return say(rng, "{name} meets {who} and [stops|stands] {where} {who}", name=name, who=who, where=close + where)
    if close or chance(rng, 0.4):
        return f"{name} {_verb(thing, rng)} over and stands {close}{where} {who}"
    return f"{name} {_verb(thing, rng)} {where} {who}"


def _swaps(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    others = [i for i in stage.characters() if i != index]
    if not others:
        return None
    other = choose(rng, others)
    one, two = stage.things[index], stage.things[other]
    stage.things[index], stage.things[other] = replace(one, cell=two.cell), replace(two, cell=one.cell)
    return say(rng, "{a} and {b} [swap|change|trade] places", a=one.name, b=two.name)


def _grows(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    thing = stage.things[index]
    if thing.size == "big":
        if thing.look.glyph:
            return None  # too small to be read
        stage.things[index] = replace(thing, size="small")
        return say(rng, "{name} [becomes small|gets small|shrinks and is small now]", name=thing.name)
    stage.things[index] = replace(thing, size="big")
    return say(rng, "{name} [becomes big|grows big|grows and is big now]", name=thing.name)


def _recolors(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    thing = stage.things[index]
    color = choose(rng, [c for c in COLORS if c != thing.look.color])
    stage.change(index, color=color)
    return say(rng, "{name} [turns|becomes] {color}", name=thing.name, color=color)


def _retextures(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    thing = stage.things[index]
    texture = choose(rng, [t for t in TEXTURES if t != thing.look.texture])
    stage.change(index, texture=texture)
    if texture == "plain":
        return f"{thing.name} loses the {choose(rng, TEXTURE_NOUNS[thing.look.texture])}"
    return say(rng, "{name} [becomes {texture}|gets {nouns}]", name=thing.name, texture=texture,
               nouns=choose(rng, TEXTURE_NOUNS[texture]))  # fmt: skip


def _dresses(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    thing = stage.things[index]
    old = thing.look.part
    if old != "none" and chance(rng, 0.5):
        stage.change(index, part="none")
        return f"{thing.name} {'puts down' if old == 'flag' else 'takes off'} the {old}"
    part = choose(rng, [p for p in PARTS[1:] if p != old])
    stage.change(index, part=part)
    if old != "none":
        return f"{thing.name} swaps the {old} for a {part}"
    return f"{thing.name} {'picks up' if part == 'flag' else 'puts on'} a {part}"


def _letters(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    thing = stage.things[index]
    if thing.size == "small":
        return None
    glyph = choose(rng, [g for g in GLYPHS if g != thing.look.glyph])
    stage.change(index, glyph=glyph)
    if thing.look.glyph:
        return say(rng, "{name} [changes to|now has] {glyph}", name=thing.name, glyph=glyph_noun(glyph))
    return say(rng, "{name} [picks up|finds|gets] {glyph}", name=thing.name, glyph=glyph_noun(glyph))


def _travels(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    """Everyone goes elsewhere; what has no name stays behind, unless only the weather or the hour changes."""
    changes = {"night": "night falls", "snow": "it begins to snow"}
    outside = [g for g in changes if g != stage.ground]
    if stage.ground not in ("room", "night") and outside and chance(rng, 0.3):
        stage.ground = choose(rng, outside)
        return changes[stage.ground]
    stage.ground = choose(rng, [g for g in GROUNDS if g != stage.ground])
    names = [stage.calls(i) for i in stage.characters()]
    left = [stage.calls(i) for i in range(len(stage.things)) if not stage.things[i].name]
    stage.things = [t for t in stage.things if t.name]
    who = names[0] if len(names) == 1 else choose(rng, (listed(names), "they all" if len(names) > 2 else "they both"))
    verb = choose(rng, ("goes", "travels") if len(names) == 1 else ("go", "travel"))
    stays = f", and {listed(left)} {'stays' if len(left) == 1 else 'stay'} behind" if left else ""
    return f"{who} {verb} {choose(rng, LANDS[stage.ground])}{stays}"


def _leaves(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    if len(stage.characters()) < 2:
        return None
    thing = stage.things.pop(index)
    stage.away.append(thing)
    return say(rng, "{name} [goes home|leaves|goes away]", name=thing.name)


def _returns(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    if not stage.away:
        return None
    thing = stage.away.pop(int(rng.random() * len(stage.away)))
    cell = choose(rng, stage.free())
    stage.things.append(replace(thing, cell=cell))
    where = choose(rng, CELL_WORDS[CELL_NAMES[cell]])
    return say(rng, "{name} [comes back and stands|comes back and is|is back,] {where}", name=thing.name, where=where)


def _appears(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    """Something new is there, with its look."""
    if len(stage.things) >= MOST_THINGS:
        return None
    thing = prop(stage, rng)
    stage.things.append(thing)
    where = choose(rng, CELL_WORDS[CELL_NAMES[thing.cell]])
    phrase = a(noun(thing, described(thing), rng))
    return say(rng, "[{phrase} appears {where}|now there is {phrase} {where}]", phrase=phrase, where=where)


def _vanishes(stage: Stage, index: int, rng: np.random.Generator) -> str | None:
    props = [i for i, t in enumerate(stage.things) if not t.name]
    if not props:
        return None
    thing = stage.things.pop(choose(rng, props))
    return say(rng, "the {kind} [disappears|is gone]", kind=thing.look.kind)


EVENTS: dict[Event, int] = {
    _goes: 4, _steps: 3, _joins: 5, _swaps: 3, _grows: 2, _recolors: 3, _retextures: 2, _dresses: 3, _letters: 2,
    _travels: 2, _leaves: 1, _returns: 4, _appears: 1, _vanishes: 1,
}  # fmt: skip
"""What can happen, and how often it is tried."""
MOVES = (_goes, _steps, _joins, _swaps, _leaves, _returns, _travels)  # one of them a frame
WEIGHTED = tuple(event for event, weight in EVENTS.items() for _ in range(weight))


def prop(stage: Stage, rng: np.random.Generator) -> Thing:
    """Something without a name, of a kind that is not there yet, in a free cell."""
    size = "small" if chance(rng, 0.3) else "big"
    look = fresh_look(stage, rng, size, False)
    return Thing(look, choose(rng, stage.free()), size)


def fresh_look(stage: Stage, rng: np.random.Generator, size: str, character: bool) -> Look:
    """A look whose kind is not on the stage; characters are mostly someone, and rich in detail."""
    used = {t.look.kind for t in (*stage.things, *stage.away)}
    alive = character and chance(rng, 0.85)
    kinds = tuple(k.name for k in KINDS.values() if k.name not in used and (k.group in ("animal", "person")) >= alive)
    if character:
        return random_look(rng, size=size, kinds=kinds, textured=0.6, with_part=0.35, with_glyph=0.4)
    return random_look(rng, size=size, kinds=kinds, textured=0.2, with_part=0.0, with_glyph=0.1)


def described(thing: Thing) -> tuple[str, ...]:
    """What is said of a thing so that its look is known; what is big, plain or bare is not said to be."""
    names = [n for n in ATTRIBUTES if n not in ("size", "texture")]
    names += ["texture"] if thing.look.texture != "plain" else []
    return tuple(names + (["size"] if thing.size == "small" else []))
