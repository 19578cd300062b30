"""Dialogues about a scene as in VisDial: a caption, then questions and answers, each among 100 candidate answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kinds import KINDS
from ..scene import COLORS, GLYPHS, GROUNDS, PARTS, SIZES, TEXTURES, Scene
from .captions import Caption, caption
from .phrases import CELL_NAMES, RELATION_WORDS, attribute, the
from .questions import VARIANTS, questions
from .words import a, chance, choose, say, shuffled

CANDIDATES = 100
EQUIVALENT = 0.8  # relevance of a candidate that means the same

POOL: tuple[str, ...] = tuple(dict.fromkeys((
    "yes", "no", "yes, it is", "no, it is not", "yes, there is", "no, there is not", "i can not tell", "maybe",
    *(f"yes, {a(p)}" for p in PARTS[1:]), "no, nothing",
    *COLORS, *TEXTURES, *SIZES, *CELL_NAMES, *GROUNDS, *(str(n) for n in range(10)), *GLYPHS.lower(), *KINDS,
    *(f"{c} and {t}" for c in COLORS for t in TEXTURES[1:]),
)))  # fmt: skip
"""Answers that candidates are drawn from."""
FOLLOW_UPS = {
    "color": "[What color is it|And what color is it|Which color does it have]?",
    "texture": "[What pattern does it have|Is it plain, striped, dotted or checked|And which pattern is on it]?",
    "size": "[Is it big or small|And is it big or small|How big is it]?",
    "part": "[Does it wear anything|And does it wear something|Does it have something to wear]?",
    "glyph": "[Is a letter or a number on it|And what letter or number is on it|Can you read something on it]?",
    "cell": "[Where is it|And where is it|Where in the picture is it]?",
    "relation": "[What is|And what is|What can you see] {words} it?",
}
SAME = {"yes": ("yes, it is", "yes, there is"), "no": ("no, it is not", "no, there is not")}


@dataclass(frozen=True)
class Round:
    """A question and its answer among candidates.

    Attributes:
        question: with its question mark; it may refer to what was spoken of before ("and what color is it?").
        answer: the right one.
        candidates: 100 different answers, the right one among them.
        index: which one it is.
        relevance: of each candidate, in [0, 1]; 1 for the right one.
    """

    question: str
    answer: str
    candidates: tuple[str, ...]
    index: int
    relevance: tuple[float, ...]


@dataclass(frozen=True)
class Dialogue:
    """A caption of an image and what was asked about it afterwards."""

    caption: Caption
    rounds: tuple[Round, ...]


def dialogue(scene: Scene, rng: np.random.Generator, rounds: int = 10) -> Dialogue:
    """A dialogue of up to `rounds` rounds; shorter only if there is no more to ask."""
    found: list[tuple[str, str]] = []
    asked: set[tuple[int | None, str]] = set()  # what was asked of which object
    topic: int | None = None
    for _ in range(8 * rounds):
        if len(found) == rounds:
            break
        if topic is not None and chance(rng, 0.65):
            name, question, answer = _follow_up(scene, topic, rng)
        elif chance(rng, 0.6):
            topic, name, question, answer = _new_topic(scene, rng)
        else:
            topic = None
            name, question, answer = _other(scene, rng)
        if question and (topic, name) not in asked:
            asked.add((topic, name))
            found.append((question, answer))
    described = caption(scene, rng)
    return Dialogue(described, tuple(_round(question, answer, rng) for question, answer in found))


def _other(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    """A question that is not about one object's looks: what is asked, the question, the answer."""
    for question in questions(scene, rng, 1):
        if question.type not in ("color", "texture", "part", "glyph", "size", "where"):
            return question.type + question.answer, question.question, question.answer
    return "", "", ""


def _new_topic(scene: Scene, rng: np.random.Generator) -> tuple[int | None, str, str, str]:
    """Something to speak of: its number, what is asked, the question and the answer."""
    index = int(rng.random() * len(scene.objects))
    obj = scene.objects[index]
    if chance(rng, 0.5) and sum(t.attributes.kind == obj.attributes.kind for t in scene.objects) == 1:
        kind = a(obj.attributes.kind)
        return index, "exists", say(rng, "[Is there|Can you see|Do you see] {kind}?", kind=kind), "yes"
    phrase = the(scene, index, rng, ("size", "texture", "part", "glyph"))
    if phrase is None:
        return None, "", "", ""
    return index, "color", say(rng, "[What color is|What is the color of] {the}?", the=phrase), obj.attributes.color


def _follow_up(scene: Scene, index: int, rng: np.random.Generator) -> tuple[str, str, str]:
    """More about what was just spoken of, which is only called "it": what is asked, the question, the answer."""
    name = choose(rng, tuple(FOLLOW_UPS))
    obj = scene.objects[index]
    if name == "relation":
        near = [(r, i) for i in range(len(scene.objects)) if i != index for r in scene.relation(i, index)]
        single = [(r, i) for r, i in near if sum(r == other for other, _ in near) == 1]
        if not single:
            return "", "", ""
        relation, other = choose(rng, single)
        question = say(rng, FOLLOW_UPS["relation"], words=choose(rng, RELATION_WORDS[relation]))
        return f"relation {relation}", question, scene.objects[other].attributes.kind
    answer = CELL_NAMES[obj.cell] if name == "cell" else attribute(obj, name).lower()
    if name == "part":
        answer = "no, nothing" if answer == "none" else f"yes, {a(answer)}"
    return name, say(rng, FOLLOW_UPS[name]), answer or "no, nothing"


def _round(question: str, answer: str, rng: np.random.Generator) -> Round:
    """The question with 100 candidates: all that means the same, and others by chance."""
    same = [w for w in (*SAME.get(answer, ()), *VARIANTS.get(answer, ())) if w != answer]
    drawn = (POOL[i] for i in rng.permutation(len(POOL))[: CANDIDATES + len(same) + 1].tolist())
    others = [w for w in drawn if w != answer and w not in same]
    candidates = shuffled(rng, [answer, *same, *others[: CANDIDATES - 1 - len(same)]])
    relevance = tuple(1.0 if c == answer else EQUIVALENT if c in same else 0.0 for c in candidates)
    return Round(question, answer, tuple(candidates), candidates.index(answer), relevance)
