"""Expressions that can only mean one thing of a scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..scene import Scene
from .captions import caption
from .phrases import ATTRIBUTES, NOTHING, RELATION_WORDS, attribute, cell_phrase, distinguishing, noun, the
from .words import chance, choose


@dataclass(frozen=True)
class Referring:
    """An expression and the index of the object that it means; `draw.boxes` has its box."""

    text: str
    index: int


def referring(scene: Scene, rng: np.random.Generator) -> Referring:
    """An expression for an object chosen by chance: by its attributes, where it is, or how it stands to another.

    Raises:
        ValueError: the scene is empty, or two objects in one place look the same.
    """
    if not scene.objects:
        raise ValueError("there is nothing in the scene to refer to")
    index = int(rng.random() * len(scene.objects))
    obj = scene.objects[index]
    more = [n for n in ATTRIBUTES if attribute(obj, n) != NOTHING.get(n)]
    start = tuple(choose(rng, more) for _ in range(int(rng.random() * 2)))
    way = choose(rng, ("looks", "looks", "place", "relation"))
    if way == "relation":
        text = _by_relation(scene, index, rng)
        if text is not None:
            return Referring(text, index)
    chosen = distinguishing(scene, index, ATTRIBUTES, rng, dict.fromkeys(start))
    if chosen is not None and way != "place":
        return Referring(f"the {noun(obj, chosen, rng)}", index)
    stated = chosen if chosen is not None and chance(rng, 0.5) else tuple(dict.fromkeys(start))
    rivals = [
        t
        for i, t in enumerate(scene.objects)
        if i != index and (t.attributes.kind, t.cell) == (obj.attributes.kind, obj.cell)
    ]
    if chosen is None and any(all(attribute(t, n) == attribute(obj, n) for n in more) for t in rivals):
        raise ValueError(f"things that look the same share cell {obj.cell}")
    if rivals:
        stated = chosen or tuple(more)
    return Referring(f"the {noun(obj, stated, rng)} {cell_phrase(obj, rng)}", index)


def grounded(scene: Scene, boxes: Sequence[str], rng: np.random.Generator) -> str:
    """A caption after a list of what it is about: `<ref>the fox</ref><box>...</box>: A fox in the snow.` or so.

    Args:
        scene: what the text describes.
        boxes: of each of its objects, as they are to be written.
        rng: source of chance.
    """
    phrases = [the(scene, index, rng) or obj.attributes.kind for index, obj in enumerate(scene.objects)]
    marked = [f"<ref>{phrase}</ref><box>{box}</box>" for phrase, box in zip(phrases, boxes, strict=True)]
    return f"{', '.join(marked)}: {caption(scene, rng).text}"


def _by_relation(scene: Scene, index: int, rng: np.random.Generator) -> str | None:
    """For instance "the fox left of the tree", where only one fox is."""
    kind = scene.objects[index].attributes.kind
    for _ in range(2):
        other = int(rng.random() * len(scene.objects))
        name = the(scene, other, rng)
        found = scene.relation(index, other) if other != index else []
        if name is None or not found:
            continue
        relation = choose(rng, found)
        same = [i for i, t in enumerate(scene.objects) if t.attributes.kind == kind and i != other]
        if sum(relation in scene.relation(i, other) for i in same) == 1:
            return f"the {kind} {choose(rng, RELATION_WORDS[relation])} {name}"
    return None
