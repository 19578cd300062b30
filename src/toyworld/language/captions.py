"""Captions and paragraphs that are true of a scene, with what they state as data."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..scene import Scene
from .phrases import (
    ATTRIBUTES,
    CELL_NAMES,
    COLOR_WORDS,
    NEVER_FIRST,
    NOTHING,
    RELATION_WORDS,
    SIZE_WORDS,
    TEXTURE_WORDS,
    Fact,
    attribute,
    cell_phrase,
    glyph_noun,
    ground_phrase,
    living,
    noun,
    the,
)
from .words import NUMBERS, a, chance, choose, listed, say, sentence, shuffled

# How often a caption says it, where an object has it. Its colour is always said.
MENTIONED = {"size": 0.25, "texture": 0.5, "part": 0.5, "glyph": 0.5}
PLAIN = 0.08  # how often "plain" is said

LIST = (
    "[There {be}|Here {be}|Here you see|You can see|I can see|We see|Look,|This is a picture of|"
    "This picture shows|The picture shows|A picture of|A drawing of|We have here] {objects}[ {ground}||].",
    "[{ground} there {be}|{ground} you can see|{ground}, there {be}|{ground} we find|{ground}, I see] {objects}.",
    "{objects} {are} {ground}.",
    "{objects}[ {ground}|].",
)
BARE_LIST = ("{objects}[ {ground}|].",)
PAIR = (
    "{a} [is|stands|can be seen|] {relation} {b}[ {ground}||].",
    "[There is|You can see|I see|We see|This is a picture of|The picture shows|] {a} {relation} {b}[ {ground}||].",
    "[{ground}, there is|{ground} you can see|{ground}] {a} {relation} {b}.",
    "{before} {b} [there is|is|stands|you can see|you find] {a}.",
)
BARE_PAIR = ("{a} {relation} {b}[ {ground}||].",)
RELATED = (
    "{a} [is|stands|can be seen|is to be found] {relation} {b}.",
    "{before} {b} [is|stands|you can see|you find] {a}.",
)
OPENING = (
    "[The picture shows|This picture shows|You can see|There {be}|Here {be}|We see] {count} {ground}.",
    "[We are|The scene is|Everything is|This is a scene] {ground}.",
    "{count} {be} {ground}.",
)
BARE_OPENING = ("{count} {ground}.", "a scene {ground}.")
PLACED = (
    "{cell} [is|stands|there is|you can see|I see|we find] {a}.",
    "{cell}, [there is|you can see|I see|we find] {a}.",
    "{a} [is|stands|can be seen] {cell}.",
    "[There is|You can see|We see|I see] {a} {cell}.",
)
BESIDE = (
    "{before} {b} [there is|is|stands|you can see|we find] {a}.",
    "{before} {b}, [there is|you can see] {a}.",
)


@dataclass(frozen=True)
class Caption:
    """A text about a scene and what it states, all of it true."""

    text: str
    facts: tuple[Fact, ...]


@dataclass
class _Teller:
    """Writes phrases about one scene and keeps what they state."""

    scene: Scene
    rng: np.random.Generator
    facts: dict[Fact, None] = field(default_factory=dict)  # in the order of the text

    def state(self, name: str, obj: int | None, value: str, other: int | None = None) -> None:
        self.facts[Fact(name, obj, value, other)] = None

    def obj(self, index: int, stated: tuple[str, ...], same: tuple[int, ...] = ()) -> str:
        """For instance "a red fox"; with others of the same attributes, "two red foxes"."""
        obj = self.scene.objects[index]
        for member in (index, *same):
            self.state("object", member, obj.attributes.kind)
            for name in stated:
                if attribute(obj, name) not in ("none", ""):
                    self.state(name, member, attribute(obj, name))
        if same:
            return f"{NUMBERS[1 + len(same)]} {noun(obj, stated, self.rng, plural=True)}"
        return a(noun(obj, stated, self.rng))

    def reference(self, index: int, stated: tuple[str, ...]) -> str | None:
        """For instance "the fox": what was said is enough to know which."""
        return the(self.scene, index, self.rng, allowed=stated)

    def ground(self) -> str:
        self.state("ground", None, self.scene.ground)
        return ground_phrase(self.scene.ground, self.rng)

    def cell(self, index: int) -> str:
        self.state("cell", index, CELL_NAMES[self.scene.objects[index].cell])
        return cell_phrase(self.scene.objects[index], self.rng)

    def relation(self, first: int, second: int) -> dict[str, str]:
        """Slots that say how `first` stands to `second`: after the object, and at the beginning of a sentence."""
        relation = choose(self.rng, self.scene.relation(first, second))
        self.state("relation", first, relation, second)
        before = [w for w in RELATION_WORDS[relation] if w not in NEVER_FIRST]
        return {"relation": choose(self.rng, RELATION_WORDS[relation]), "before": choose(self.rng, before)}


def caption(scene: Scene, rng: np.random.Generator, *, bare: bool = False) -> Caption:
    """A sentence or two that name every object with its colour, some with more, and perhaps a relation and the ground.

    Args:
        scene: what to speak of; it has at least one object.
        rng: makes every choice.
        bare: a noun phrase in lower case, to go on after "a photo of".
    """
    teller = _Teller(scene, rng)
    stated = [_mentioned(scene, i, rng) for i in range(len(scene.objects))]
    groups = _groups(scene, stated)
    single = [g[0] for g in groups if len(g) == 1]
    pairs = [(x, y) for x in single for y in single if x != y and scene.relation(x, y)]
    if len(scene.objects) == 2 and pairs and chance(rng, 0.6):
        text = _pair(teller, *choose(rng, pairs), stated, BARE_PAIR if bare else PAIR)
    else:
        text = _list(teller, shuffled(rng, groups), stated, BARE_LIST if bare else LIST)
        if pairs and chance(rng, 0.5):
            text += _related(teller, *choose(rng, pairs), stated)
    return Caption(text[:1].lower() + text[1:] if bare else text, tuple(teller.facts))


def paragraph(scene: Scene, rng: np.random.Generator, *, bare: bool = False) -> Caption:
    """Every object with all that can be seen of it and where it is, and relations between them.

    Args:
        scene: what to speak of; it has at least one object.
        rng: makes every choice.
        bare: begin with a noun phrase in lower case, to go on after "The image depicts".
    """
    teller = _Teller(scene, rng)
    stated = [_everything(scene, i, rng) for i in range(len(scene.objects))]
    sentences = [_opening(teller, bare)]
    done: list[int] = []
    for index in shuffled(rng, range(len(scene.objects))):
        sentences.append(_introduced(teller, index, done, stated))
        done.append(index)
    pairs = [(x, y) for x in done for y in done if x != y and scene.relation(x, y)]
    related = {(f.obj, f.other) for f in teller.facts if f.name == "relation"}
    left = [p for p in pairs if p not in related and p[::-1] not in related]
    for first, second in shuffled(rng, left)[: 1 + int(rng.random() * 2)]:
        if (first, second) not in related and (second, first) not in related:
            sentences.append(_related(teller, first, second, stated).strip())
            related.add((first, second))
    text = " ".join(s for s in sentences if s)
    return Caption(text[:1].lower() + text[1:] if bare else text, tuple(teller.facts))


def _mentioned(scene: Scene, index: int, rng: np.random.Generator) -> tuple[str, ...]:
    obj = scene.objects[index]
    names = ["color"]
    for name, probability in MENTIONED.items():
        nothing = attribute(obj, name) == NOTHING.get(name)
        if chance(rng, (PLAIN if name == "texture" else 0) if nothing else probability):
            names.append(name)
    return tuple(names)


def _everything(scene: Scene, index: int, rng: np.random.Generator) -> tuple[str, ...]:
    obj = scene.objects[index]
    has = tuple(n for n in ATTRIBUTES if attribute(obj, n) != NOTHING.get(n))
    return (*has, "texture") if "texture" not in has and chance(rng, PLAIN) else has


def _groups(scene: Scene, stated: list[tuple[str, ...]]) -> list[tuple[int, ...]]:
    """Objects that the caption says the same about go together: "two red foxes"."""
    groups: dict[tuple, tuple[int, ...]] = {}
    for index, obj in enumerate(scene.objects):
        key = (obj.attributes.kind, *((n, attribute(obj, n)) for n in stated[index]))
        groups[key] = (*groups.get(key, ()), index)
    return list(groups.values())


def _list(teller: _Teller, groups: list[tuple[int, ...]], stated: list[tuple[str, ...]], templates: tuple) -> str:
    objects = listed([teller.obj(g[0], stated[g[0]], g[1:]) for g in groups])
    several = len(teller.scene.objects) > 1
    be = "are" if len(groups[0]) > 1 else "is"
    return _fill(teller, templates, objects=objects, be=be, are="are" if several else "is")


def _pair(teller: _Teller, first: int, second: int, stated: list[tuple[str, ...]], templates: tuple) -> str:
    texts = {"a": teller.obj(first, stated[first]), "b": teller.obj(second, stated[second])}
    return _fill(teller, templates, **texts, **teller.relation(first, second))


def _related(teller: _Teller, first: int, second: int, stated: list[tuple[str, ...]]) -> str:
    """A sentence of its own on how they stand; empty if what was said does not tell them from others."""
    one, two = (teller.reference(i, stated[i]) for i in (first, second))
    if one is None or two is None:
        return ""
    return " " + _fill(teller, RELATED, a=one, b=two, **teller.relation(first, second))


def _opening(teller: _Teller, bare: bool) -> str:
    number = len(teller.scene.objects)
    template = choose(teller.rng, BARE_OPENING if bare else OPENING)
    count = f"{NUMBERS[number]} {'thing' if number == 1 else 'things'}"
    if number == 1 and "{count}" in template:
        template = choose(teller.rng, (BARE_OPENING if bare else OPENING)[1:2])
    if "{count}" in template:
        teller.state("count", None, str(number))
    return _fill(teller, (template,), count=count, be="is" if number == 1 else "are")


def _introduced(teller: _Teller, index: int, done: list[int], stated: list[tuple[str, ...]]) -> str:
    """One object for the first time, in one sentence or with a second one: "It is striped and wears a crown."."""
    rng = teller.rng
    names = shuffled(rng, stated[index])
    later = tuple(names[: int(rng.random() * 3)]) if chance(rng, 0.5) else ()
    now = tuple(n for n in stated[index] if n not in later)
    anchors = [d for d in done if teller.scene.relation(index, d)]
    anchor = choose(rng, anchors) if anchors and chance(rng, 0.5) else None
    name = None if anchor is None else teller.reference(anchor, stated[anchor])
    if anchor is not None and name is not None:
        text = _fill(teller, BESIDE, b=name, a=teller.obj(index, now), **teller.relation(index, anchor))
    else:
        text = _fill(teller, PLACED, cell=teller.cell(index), a=teller.obj(index, now))
    return f"{text} {_more(teller, index, later)}".strip()


def _more(teller: _Teller, index: int, names: tuple[str, ...]) -> str:
    """The attributes that its introduction left out."""
    if not names:
        return ""
    obj, rng = teller.scene.objects[index], teller.rng
    for name in names:
        teller.state(name, index, attribute(obj, name))
    words = [choose(rng, w[attribute(obj, n)]) for n, w in
             (("size", SIZE_WORDS), ("color", COLOR_WORDS), ("texture", TEXTURE_WORDS)) if n in names]  # fmt: skip
    glyph = obj.attributes.glyph if "glyph" in names else ""
    if glyph and words and chance(rng, 0.4):
        words, glyph = [*words, f"marked {glyph}"], ""
    clauses = [f"is {listed(words)}"] if words else []
    if "part" in names:
        wears = obj.attributes.part != "flag" and living(obj)
        clauses.append(f"{choose(rng, ('wears', 'has') if wears else ('has',))} a {obj.attributes.part}")
    if glyph:
        has = clauses[-1].removeprefix("has ") if clauses and clauses[-1].startswith("has") else ""
        ways = (f"has {glyph_noun(glyph)} on it", f"has {a(glyph)} on it")
        clauses.append(
            choose(rng, ways if clauses else (*ways, f"is marked {glyph}")).removeprefix("has " if has else "")
        )
    return sentence(f"it {' and '.join(clauses)}")


def _fill(teller: _Teller, templates: tuple[str, ...], **slots: str) -> str:
    """A sentence; the ground counts as stated only where the wording that was chosen has it."""
    text = say(teller.rng, choose(teller.rng, templates), ground="{ground}", **slots)
    if "{ground}" in text:
        text = text.replace("{ground}", teller.ground())
    return sentence(text)
