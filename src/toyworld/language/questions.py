"""Questions about a scene that have one short answer, with ten people's answers as in VQAv2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..kinds import KINDS
from ..scene import COLORS, PARTS, TEXTURES, Scene, SceneObject
from .phrases import ATTRIBUTES, CELL_NAMES, CELL_WORDS, NOTHING, RELATION_WORDS, attribute, glyph_noun, living, the
from .words import NUMBERS, a, chance, choose, say

PEOPLE = 10  # answer each question
UNANSWERABLE = "unanswerable"
VARIANTS = {
    "gray": ("grey",), "striped": ("stripes", "stripy"), "dotted": ("dots", "spotted"), "checked": ("checkered",),
    "plain": ("none",), "big": ("large",), "small": ("little",), "meadow": ("grass",), "beach": ("sand",),
    "sea": ("water",), "night": ("night sky",), "room": ("indoors",), "middle": ("center",),
    "0": ("zero", "none"), **{str(n): (NUMBERS[n],) for n in range(1, 6)},
}  # fmt: skip
GROUP_WORDS = {
    "figure": "figures", "animal": "animals", "plant": "plants", "building": "buildings", "vehicle": "vehicles",
    "food": "kinds of food", "person": "people",
}  # fmt: skip
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Attributes:
        question: with its question mark.
        answer: the right one, in lower case.
        answers: what ten people say: mostly the same, some in other words.
        type: of `QUESTIONS`, what it asks about; or "unanswerable".
    """

    question: str
    answer: str
    answers: tuple[str, ...]
    type: str

    @property
    def answer_type(self) -> str:
        """As VQAv2 calls it: "yes/no", "number" or "other"."""
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "number" if self.answer.isdigit() and self.type == "count" else "other"


Asked = tuple[str, str] | None  # question and answer, or nothing to ask


def questions(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Up to `count` different questions with one right answer each; fewer only if a scene has no more to ask."""
    found: dict[tuple[str, ...], Question] = {}
    for _ in range(16 * count):
        if len(found) == count:
            break
        name = choose(rng, WEIGHTED)
        asked = QUESTIONS[name][0](scene, rng)
        if asked is None:
            continue
        question, answer = asked
        key = (question,) if answer in ("yes", "no") else (name, answer)  # not the same again in other words
        if key not in found:
            found[key] = Question(question, answer, _people(answer, name, rng), name)
    return list(found.values())


def unanswerable(scene: Scene, rng: np.random.Generator) -> Question:
    """A question about something that is not there, which people answer with "unanswerable"."""
    there = {obj.attributes.kind for obj in scene.objects}
    kind = choose(rng, tuple(name for name in KINDS if name not in there))
    text = say(rng, "[What color is {the}|What pattern does {the} have|Where is {the}|Is {the} big or small|"
               "Which letter is on {the}|Which number can you read on {the}]?", the=f"the {kind}")  # fmt: skip
    return Question(text, UNANSWERABLE, (UNANSWERABLE,) * PEOPLE, UNANSWERABLE)


def region_question(scene: Scene, index: int, rng: np.random.Generator) -> Question:
    """A question about object `index`, which something else than its words points out."""
    obj = scene.objects[index]
    name = choose(rng, [n for n in REGION_QUESTIONS if n == "kind" or attribute(obj, n) not in ("none", "")])
    answer = (obj.attributes.kind if name == "kind" else attribute(obj, name)).lower()
    sign = "number" if answer.isdigit() else "letter"
    return Question(say(rng, REGION_QUESTIONS[name], sign=sign), answer, _people(answer, name, rng), name)


def _people(answer: str, name: str, rng: np.random.Generator) -> tuple[str, ...]:
    """Ten answers; up to three people say it in other words."""
    variants = VARIANTS.get(answer, ()) if name != "glyph" else ()
    if name in ("which", "place", "relation") and not variants:
        variants = (a(answer), f"the {answer}")
    others = int(rng.random() * 4) if variants and chance(rng, 0.6) else 0
    said = [answer] * (PEOPLE - others) + [choose(rng, variants) for _ in range(others)]
    return tuple(said)


def _pick(scene: Scene, rng: np.random.Generator) -> tuple[int, SceneObject]:
    index = int(rng.random() * len(scene.objects))
    return index, scene.objects[index]


def _named(scene: Scene, index: int, rng: np.random.Generator, hidden: str = "") -> str | None:
    """For instance "the fox", without the attribute that is asked for; sometimes with more than is needed."""
    allowed = [n for n in ATTRIBUTES if n != hidden]
    more = [n for n in allowed if attribute(scene.objects[index], n) != NOTHING.get(n)]
    start = (choose(rng, more),) if more and chance(rng, 0.2) else ()
    return the(scene, index, rng, allowed, start)


def _asks(template: str, name: str) -> Callable[[Scene, np.random.Generator], Asked]:
    """Asks for an attribute of something that has it."""

    def ask(scene: Scene, rng: np.random.Generator) -> Asked:
        having = [i for i, t in enumerate(scene.objects) if attribute(t, name) not in ("none", "")]
        index = choose(rng, having) if having else None
        phrase = None if index is None else _named(scene, index, rng, name)
        if index is None or phrase is None:
            return None
        value = attribute(scene.objects[index], name)
        kind = "number" if value.isdigit() else "letter"
        verb = ("hold", "holding") if value == "flag" else ("wear", "wearing")
        text = say(rng, template, the=phrase, sign=kind, wear=verb[0], wearing=verb[1])
        return text, value.lower()

    return ask


def _which(scene: Scene, rng: np.random.Generator) -> Asked:
    """Asks what it is that alone has some attribute."""
    _, obj = _pick(scene, rng)
    name = choose(rng, ("color", "texture", "part", "glyph"))
    value = attribute(obj, name)
    if value == NOTHING.get(name) or sum(attribute(t, name) == value for t in scene.objects) > 1:
        return None
    if name == "part":
        text = say(rng, f"[What|Who] {'holds' if value == 'flag' else 'wears'} a {value}?" if living(obj)
                   else f"What has a {value}?")  # fmt: skip
    elif name == "glyph":
        text = say(rng, "What [has {glyph} on it|is marked {value}]?", glyph=glyph_noun(value), value=value)
    else:
        text = say(rng, "[What is {value}|Which thing is {value}|What is the {value} thing]?", value=value)
    return text, obj.attributes.kind


def _relation(scene: Scene, rng: np.random.Generator) -> Asked:
    """Asks what is left of something, where only one object is."""
    index, _ = _pick(scene, rng)
    found = [(r, i) for i in range(len(scene.objects)) if i != index for r in scene.relation(i, index)]
    single = [(r, i) for r, i in found if sum(r == other for other, _ in found) == 1]
    phrase = _named(scene, index, rng)
    if not single or phrase is None:
        return None
    relation, other = choose(rng, single)
    words = choose(rng, RELATION_WORDS[relation])
    return say(rng, "[What is|What can you see|Which thing is] {words} {the}?", words=words, the=phrase), (
        scene.objects[other].attributes.kind
    )


def _place(scene: Scene, rng: np.random.Generator) -> Asked:
    """Asks what stands somewhere; "on the left" only if nothing else stands in the left column."""
    index, obj = _pick(scene, rng)
    name = CELL_NAMES[obj.cell]
    others = [t for i, t in enumerate(scene.objects) if i != index]
    if name in ("left", "right"):
        alone = all(t.column != obj.column for t in others)
    elif name in ("top", "bottom"):
        alone = all(t.row != obj.row for t in others)
    else:
        alone = all(t.cell != obj.cell for t in others)
    if not alone:
        return None
    return say(
        rng, "[What is|What can you see|What stands] {cell}?", cell=choose(rng, CELL_WORDS[name])
    ), obj.attributes.kind


def _where(scene: Scene, rng: np.random.Generator) -> Asked:
    """Asks in which part of the image something is."""
    index, obj = _pick(scene, rng)
    phrase = _named(scene, index, rng)
    if phrase is None:
        return None
    return say(rng, "[Where is|Where in the picture is|In which part of the picture is] {the}?", the=phrase), (
        CELL_NAMES[obj.cell]
    )


def _ground(scene: Scene, rng: np.random.Generator) -> Asked:
    return say(rng, "[What is the background|What does the background show|What is behind everything|"
               "Which background does the picture have]?"), scene.ground  # fmt: skip


def _count(scene: Scene, rng: np.random.Generator) -> Asked:
    """Counts everything, a kind, a group or a colour; sometimes there is none."""
    _, obj = _pick(scene, rng)
    by = choose(rng, ("all", "kind", "kind", "group", "color"))
    if by == "all":
        plural, number = choose(rng, ("things", "objects")), len(scene.objects)
    elif by == "kind":
        name = choose(rng, tuple(KINDS)) if chance(rng, 0.15) else obj.attributes.kind
        plural, number = KINDS[name].plural, sum(t.attributes.kind == name for t in scene.objects)
    elif by == "group":
        name = choose(rng, tuple(GROUP_WORDS)) if chance(rng, 0.15) else KINDS[obj.attributes.kind].group
        plural, number = GROUP_WORDS[name], sum(KINDS[t.attributes.kind].group == name for t in scene.objects)
    else:
        name = choose(rng, COLORS) if chance(rng, 0.15) else obj.attributes.color
        plural, number = f"{name} things", sum(t.attributes.color == name for t in scene.objects)
    text = say(rng, "How many {plural} [are there|are in the picture|can you see|do you see]?", plural=plural)
    return text, str(number)


def _exists(scene: Scene, rng: np.random.Generator) -> Asked:
    """Is there a (red) fox? As often yes as no."""
    _, obj = _pick(scene, rng)
    kind, color = obj.attributes.kind, obj.attributes.color if chance(rng, 0.6) else ""
    yes = chance(rng, 0.5)
    if not yes:
        swap_color = bool(color) and chance(rng, 0.5)
        color = choose(rng, COLORS) if swap_color else color
        kind = kind if swap_color else choose(rng, tuple(KINDS))
    there = any(t.attributes.kind == kind and color in ("", t.attributes.color) for t in scene.objects)
    if there != yes:
        return None
    object_there = a(f"{color} {kind}".strip())
    return say(rng, "[Is there|Can you see|Do you see] {obj}[ in the picture|]?", obj=object_there), _yes(yes)


def _is_it(scene: Scene, rng: np.random.Generator) -> Asked:
    """Is the fox red? Does it wear a hat? Is it left of the tree? As often yes as no."""
    index, obj = _pick(scene, rng)
    yes = chance(rng, 0.5)
    name = choose(rng, ("color", "texture", "part", "relation"))
    phrase = _named(scene, index, rng, name)
    if phrase is None:
        return None
    if name == "relation":
        return _is_related(scene, rng, index, phrase, yes)
    values = {"color": COLORS, "texture": TEXTURES[1:], "part": PARTS[1:]}[name]
    value = attribute(obj, name)
    said = value if yes else choose(rng, [v for v in values if v != value])
    if said not in values:
        return None
    text = f"Does {phrase} have {a(said)}?" if name == "part" else f"Is {phrase} {said}?"
    return text, _yes(yes)


def _is_related(scene: Scene, rng: np.random.Generator, index: int, phrase: str, yes: bool) -> Asked:
    other, _ = _pick(scene, rng)
    second = _named(scene, other, rng)
    found = [] if other == index else scene.relation(index, other)
    if second is None or not found:
        return None
    relation = choose(rng, found)
    if not yes:
        if relation not in OPPOSITE:
            return None
        relation = OPPOSITE[relation]
    return f"Is {phrase} {choose(rng, RELATION_WORDS[relation])} {second}?", _yes(yes)


def _compare(scene: Scene, rng: np.random.Generator) -> Asked:
    """Which of two is bigger; they are of different kinds and sizes."""
    first, one = _pick(scene, rng)
    second, two = _pick(scene, rng)
    names = [_named(scene, i, rng, "size") for i in (first, second)]
    if one.size == two.size or one.attributes.kind == two.attributes.kind or None in names:
        return None
    word = choose(rng, ("bigger", "smaller"))
    answer = one if (one.size == "big") == (word == "bigger") else two
    return f"Which is {word}, {names[0]} or {names[1]}?", answer.attributes.kind


def _yes(yes: bool) -> str:
    return "yes" if yes else "no"


QUESTIONS: dict[str, tuple[Callable[[Scene, np.random.Generator], Asked], int]] = {
    "color": (_asks("[What color is {the}|What is the color of {the}|Which color does {the} have]?", "color"), 4),
    "texture": (
        _asks("[Is {the} plain, striped, dotted or checked|What pattern does {the} have|"
              "Which pattern is on {the}|What is the pattern of {the}]?", "texture"), 3),
    "part": (_asks("[What does {the} {wear}|What is {the} {wearing}]?", "part"), 3),
    "glyph": (
        _asks("[What {sign} is on {the}|Which {sign} is on {the}|What {sign} does {the} have|"
              "Which {sign} can you read on {the}]?", "glyph"), 4),
    "size": (_asks("[Is {the} big or small|What size is {the}|How big is {the}]?", "size"), 1),
    "which": (_which, 3),
    "relation": (_relation, 3),
    "place": (_place, 2),
    "where": (_where, 1),
    "ground": (_ground, 1),
    "count": (_count, 3),
    "exists": (_exists, 3),
    "is": (_is_it, 3),
    "compare": (_compare, 1),
}  # fmt: skip
"""What can be asked: how, and how often."""
REGION_QUESTIONS = {
    "kind": "[What is this|What is shown here|What is it]?",
    "color": "[What color is it|Which color does this have]?",
    "texture": "[Is it plain, striped, dotted or checked|What pattern does it have]?",
    "part": "[What does it have on|What does it wear or hold]?",
    "glyph": "[What {sign} is on it|Which {sign} can you read here]?",
    "size": "Is it big or small?",
}
"""What can be asked about something that is pointed out."""
WEIGHTED = tuple(name for name, (_, weight) in QUESTIONS.items() for _ in range(weight))
