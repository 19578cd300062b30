"""Illustrated stories: characters are introduced once, in words or only in the first image, and then go by name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .language.phrases import ATTRIBUTES, NOTHING, attribute, cell_phrase, ground_phrase, noun
from .language.words import a, chance, choose, say, sentence, shuffled
from .sampling import Split, split_of
from .scene import GROUNDS, Scene, SceneObject
from .stage import LOOKS, MOVES, WEIGHTED, Event, Stage, described, fresh_attributes, prop

NAMES = (
    "Mila", "Tom", "Ada", "Ben", "Ivo", "Lea", "Max", "Nia", "Otto", "Pia", "Rex", "Sam", "Tia", "Uma", "Vic", "Zoe",
    "Finn", "Gus", "Hana", "Kim", "Leo", "Nora", "Ole", "Ruby",
)  # fmt: skip
SHOWN = 0.5  # share of stories that do not state all attributes of a character
FEWEST_WORDS = 8  # of a frame; shorter ones are filled up with where everyone is
CAST = ((1, 0), (1, 1), (1, 1), (1, 2), (2, 0), (2, 0), (2, 1), (2, 1), (3, 0))  # characters, other objects


@dataclass(frozen=True)
class Frame:
    """A piece of text and its image.

    Attributes:
        text: with what came before, it determines the image; what it does not mention stays as it was.
        scene: the image.
        unsaid: numbers of objects in it whose attributes no text up to here has stated, so that an earlier image is
            needed.
    """

    text: str
    scene: Scene
    unsaid: tuple[int, ...]


@dataclass(frozen=True)
class Story:
    """A story of two or more frames.

    Attributes:
        frames: in order.
        characters: the names of those who take part.
    """

    frames: tuple[Frame, ...]
    characters: tuple[str, ...]


def story(rng: np.random.Generator, *, frames: tuple[int, int] = (2, 6), split: Split | None = None,
          shown: float = SHOWN) -> Story:  # fmt: skip
    """Return a random story.

    Args:
        rng: makes every choice.
        frames: the fewest and the most frames.
        split: of the first image's arrangement; None: any.
        shown: share of stories in which only the first image shows the attributes of at least one character.

    Raises:
        ValueError: `frames` is not a range that begins with 1 or more.
    """
    if not 1 <= frames[0] <= frames[1]:
        raise ValueError(f"frames={frames}: give the fewest and the most, at least 1")
    number = frames[0] + int(rng.random() * (frames[1] - frames[0] + 1))
    stage = _opening_stage(rng)
    while split is not None and split_of(stage.scene()) != split:
        stage = _opening_stage(rng)
    names = tuple(t.name for t in stage.objects if t.name)
    text = _opening(stage, rng, hide=chance(rng, shown))
    found = [Frame(text, stage.scene(), stage.unsaid())]
    for _ in range(number - 1):
        found.append(Frame(_happens(stage, rng), stage.scene(), stage.unsaid()))
    return Story(tuple(found), names)


def _opening_stage(rng: np.random.Generator) -> Stage:
    characters, others = choose(rng, CAST)
    stage = Stage([], choose(rng, GROUNDS), int(rng.integers(2**31)))
    for name in shuffled(rng, NAMES)[:characters]:
        size = "small" if chance(rng, 0.2) else "big"
        stage.objects.append(
            SceneObject(fresh_attributes(stage, rng, size, True), choose(rng, stage.free()), size, name=name)
        )
    for _ in range(others):
        stage.objects.append(prop(stage, rng))
    return stage


def _opening(stage: Stage, rng: np.random.Generator, hide: bool) -> str:
    """Return the text that introduces all objects and their places. With `hide`, it does not state all attributes."""
    characters = stage.characters()
    hidden = [i for i in characters if hide and chance(rng, 0.5)] or ([choose(rng, characters)] if hide else [])
    sentences = []
    for index, obj in enumerate(stage.objects):
        if obj.name:
            said = _said(obj, rng, index in hidden)
            stage.known[obj.name] = set(LOOKS) if said is None else set(said) & set(LOOKS)
            sentences.append(_presented(obj, ("kind", *described(obj)) if said is None else said, rng))
        else:
            phrase, where = a(noun(obj, described(obj), rng)), cell_phrase(obj, rng)
            sentences.append(say(rng, "[{phrase} is {where}|there is {phrase} {where}]", phrase=phrase, where=where))
    ground = ground_phrase(stage.ground, rng)
    if chance(rng, 0.5):
        return " ".join(sentence(s) for s in [f"{ground}, {sentences[0]}", *sentences[1:]])
    where = say(rng, "[we are|the story begins|all this is] {ground}", ground=ground)
    return " ".join(sentence(s) for s in [*sentences, where])


def _said(obj: SceneObject, rng: np.random.Generator, hidden: bool) -> tuple[str, ...] | None:
    """Return the names of the attributes to state; None: all. The size always is: "small", or nothing for big."""
    if not hidden:
        return None
    size = ("size",) if obj.size == "small" else ()
    if chance(rng, 0.35):
        return size  # not even what it is
    has = [n for n in ATTRIBUTES if n != "size" and attribute(obj, n) != NOTHING.get(n)]
    named = shuffled(rng, has)[: int(rng.random() * len(has))]  # at least one is left out
    return ("kind", *size, *named)


def _presented(obj: SceneObject, said: tuple[str, ...], rng: np.random.Generator) -> str:
    """For instance "Mila the striped fox is on the left"."""
    where = cell_phrase(obj, rng)
    stands = choose(rng, ("is", "stands", "waits"))
    attributes = [n for n in said if n in ATTRIBUTES]
    if "kind" not in said:
        small = choose(rng, ("little ", "small ")) if "size" in said else ""
        return f"{small}{obj.name} {stands} {where}"
    phrase = noun(obj, attributes, rng)
    if chance(rng, 0.5):
        comma = "," if " with " in phrase or " wearing " in phrase or " marked " in phrase else ""
        return f"{obj.name}{comma} the {phrase}{comma} {stands} {where}"
    return say(rng, "{name} is {phrase} and [stands|waits] {where}", name=obj.name, phrase=a(phrase), where=where)


def _happens(stage: Stage, rng: np.random.Generator) -> str:
    """Change the stage by one or two events, and return the text of the next frame."""
    before, ground = {stage.calls(i): t.cell for i, t in enumerate(stage.objects)}, stage.ground
    clauses: list[str] = []
    done: list[Event] = []
    wanted = 2 if chance(rng, 0.4) else 1
    while len(clauses) < wanted:
        event = choose(rng, WEIGHTED)
        if event in done or (event in MOVES and any(e in MOVES for e in done)):
            continue
        text = event(stage, choose(rng, stage.characters()), rng)
        if text is not None:
            clauses.append(text)
            done.append(event)
    start = choose(rng, ("then ", "now ", "next, ", "soon ", "later, ", "after a while ", "", "", "", ""))
    if " now" in f" {clauses[0]}":
        start = ""
    sentences = [sentence(start + clauses[0]), *(sentence(c) for c in clauses[1:])]
    still = [i for i, t in enumerate(stage.objects) if before.get(stage.calls(i)) == t.cell]
    where = [f"{stage.calls(i)} is still {cell_phrase(stage.objects[i], rng)}" for i in shuffled(rng, still)]
    if ground == stage.ground:
        where.append(f"{stage.calls(stage.characters()[0])} is still {ground_phrase(ground, rng)}")
    for text in where:
        if len(" ".join(sentences).split()) >= FEWEST_WORDS:
            break
        sentences.append(sentence(text))
    return " ".join(sentences)
