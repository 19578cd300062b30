"""What is said about scenes of the shifted world: short notes in place of the first world's sentences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..language.captions import Caption
from ..language.dialogues import CANDIDATES, Dialogue, Round
from ..language.questions import PEOPLE, Question
from ..language.referring import Referring
from ..language.words import choose, say, shuffled
from ..scene import Scene, SceneObject
from .world import COLORS, GROUNDS, KINDS, MOST, PLACES

BACKDROPS = {name: (f"backdrop {name}", f"{name} backdrop") for name in GROUNDS}
COUNTS = ("zero", "single", "double", "triple")[: MOST + 1]
ANSWERS = (*COLORS, *KINDS, *GROUNDS, *PLACES, *COUNTS, "affirmative", "negative")
POOL = (*ANSWERS, *(f"{color} {kind}" for color in COLORS for kind in KINDS), *(f"{p} sector" for p in PLACES))


@dataclass(frozen=True)
class _Asked:
    question: str
    answer: str
    about: str


def item(obj: SceneObject) -> str:
    """For instance "teal key"."""
    return f"{obj.attributes.color} {obj.attributes.kind}"


def place(obj: SceneObject) -> str:
    """For instance "north-west"."""
    return PLACES[obj.cell]


def caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """A note on every object, its sector and the ground: "Inventory: teal key (north-west); desert backdrop"."""
    parts = [say(rng, "{what} [({where})|@ {where}|in sector {where}]", what=item(o), where=place(o))
             for o in shuffled(rng, scene.objects)]  # fmt: skip
    listed = choose(rng, (", ", " + ", " / ")).join(parts)
    text = say(rng, "[Inventory|Contents|Log entry|Register]: {listed}; {ground}.", listed=listed,
               ground=choose(rng, BACKDROPS[scene.ground]))  # fmt: skip
    return Caption(text, ())


def questions(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Up to `count` different questions with one right answer each."""
    found = {}
    for _ in range(8 * count):
        if len(found) < count:
            asked = _ask(scene, rng)
            found.setdefault(asked.question, Question(asked.question, asked.answer, (asked.answer,) * PEOPLE,
                                                      asked.about))  # fmt: skip
    return list(found.values())


def _ask(scene: Scene, rng: np.random.Generator) -> _Asked:
    obj = choose(rng, scene.objects)
    about = choose(rng, ("tint", "item", "sector", "backdrop", "tally", "presence"))
    kind, color, where = obj.attributes.kind, obj.attributes.color, place(obj)
    if about == "tint":
        return _Asked(say(rng, "[State the tint of the {kind}|Tint of the {kind}]?", kind=kind), color, about)
    if about == "item":
        return _Asked(say(rng, "[Name the item in sector {where}|Item in sector {where}]?", where=where), kind, about)
    if about == "sector":
        return _Asked(say(rng, "[Sector of the {kind}|Locate the {kind}]?", kind=kind), where, about)
    if about == "backdrop":
        return _Asked(choose(rng, ("State the backdrop?", "Which backdrop?")), scene.ground, about)
    if about == "tally":
        return _Asked(choose(rng, ("Tally of items?", "State the tally?")), COUNTS[len(scene.objects)], about)
    if rng.random() < 0.5:
        kind = choose(rng, [k for k in KINDS if k not in {o.attributes.kind for o in scene.objects}])
    there = any(o.attributes.kind == kind for o in scene.objects)
    question = say(rng, "[Confirm {kind}|{kind} registered]?", kind=kind)
    return _Asked(question[:1].upper() + question[1:], "affirmative" if there else "negative", about)


def referring(scene: Scene, rng: np.random.Generator) -> Referring:
    """An expression for an object, by its kind, colour and sector."""
    index = int(rng.random() * len(scene.objects))
    obj = scene.objects[index]
    ways = [f"item {obj.attributes.kind}", f"item in sector {place(obj)}", f"{item(obj)}, sector {place(obj)}"]
    if sum(o.attributes.color == obj.attributes.color for o in scene.objects) == 1:
        ways.append(f"{obj.attributes.color} item")
    return Referring(choose(rng, ways), index)


def dialogue(scene: Scene, rng: np.random.Generator, rounds: int = 6) -> Dialogue:
    """A dialogue of up to `rounds` questions, each with its answer among 100 candidates."""
    found = []
    for question in questions(scene, rng, rounds):
        others = [POOL[i] for i in rng.permutation(len(POOL)).tolist() if POOL[i] != question.answer]
        candidates = tuple(shuffled(rng, [question.answer, *others[: CANDIDATES - 1]]))
        relevance = tuple(float(c == question.answer) for c in candidates)
        index = candidates.index(question.answer)
        found.append(Round(question.question, question.answer, candidates, index, relevance))
    return Dialogue(caption(scene, rng), tuple(found))
