"""Small tools of a grammar: chance by an explicit generator, templates with alternatives, articles, lists, numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")

NUMBERS = ("no", "one", "two", "three", "four", "five")
_VOWEL_SOUND = re.compile(r"^(?:[aeio]|u(?!nic|ni[^nm]))", re.IGNORECASE)
_SPELLED_WITH_VOWEL = frozenset("AEFHILMNORSX8")  # "an F", "an 8"


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of them, each as likely. `rng.choice` costs thirty times as much."""
    return options[int(rng.random() * len(options))]


def chance(rng: np.random.Generator, probability: float) -> bool:
    """True that often."""
    return rng.random() < probability


def shuffled(rng: np.random.Generator, items: Sequence[T]) -> list[T]:
    """The same items in any order."""
    items = list(items)
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        items[last], items[other] = items[other], items[last]
    return items


def say(rng: np.random.Generator, template: str, **slots: str) -> str:
    """One wording of a template: "[There is|I see] {object}[ {ground}|]." has four.

    `[a|b]` is one of its alternatives (they nest), `{name}` is replaced by the text of that name.
    """
    return _expand(_parse(template), rng, slots)


def wordings(template: str) -> int:
    """How many wordings a template has, its slots aside."""
    return _count(_parse(template))


def _expand(nodes: tuple, rng: np.random.Generator, slots: dict[str, str]) -> str:
    parts = []
    for kind, value in nodes:
        if kind == "text":
            parts.append(value)
        elif kind == "slot":
            parts.append(slots[value])
        else:
            parts.append(_expand(choose(rng, value), rng, slots))
    return "".join(parts)


def _count(nodes: tuple) -> int:
    product = 1
    for kind, value in nodes:
        if kind == "choice":
            product *= sum(_count(option) for option in value)
    return product


@cache
def _parse(template: str) -> tuple:
    nodes, end = _sequence(template, 0)
    if end != len(template):
        raise ValueError(f"unbalanced brackets in the template {template!r}")
    return nodes


def _sequence(template: str, start: int) -> tuple[tuple, int]:
    """The nodes from `start` to the end of the alternative, and where that is."""
    nodes: list[tuple] = []
    at = start
    while at < len(template) and template[at] not in "|]":
        if template[at] == "[":
            options, at = [], at + 1
            while True:
                option, at = _sequence(template, at)
                options.append(option)
                if at >= len(template):
                    raise ValueError(f"unbalanced brackets in the template {template!r}")
                at += 1
                if template[at - 1] == "]":
                    break
            nodes.append(("choice", tuple(options)))
        elif template[at] == "{":
            end = template.index("}", at)
            nodes.append(("slot", template[at + 1 : end]))
            at = end + 1
        else:
            end = at
            while end < len(template) and template[end] not in "[]{|":
                end += 1
            nodes.append(("text", template[at:end]))
            at = end
    return tuple(nodes), at


def a(phrase: str) -> str:
    """`phrase` with "a" or "an"; a single letter or digit as it is spelled ("an F")."""
    first = phrase.split(" ", 1)[0]
    vowel = first.upper() in _SPELLED_WITH_VOWEL if len(first) == 1 else bool(_VOWEL_SOUND.match(first))
    return f"{'an' if vowel else 'a'} {phrase}"


def listed(items: Sequence[str]) -> str:
    """For instance "a cat, a dog and a tree"; with a comma before "and" where an item itself goes on after its noun."""
    if len(items) < 2:
        return "".join(items)
    heavy = any(word in f" {item} " for item in items for word in (" with ", " and ", " marked ", " wearing "))
    return f"{', '.join(items[:-1])}{',' if heavy else ''} and {items[-1]}"


def sentence(text: str) -> str:
    """`text` with single spaces, a capital letter and a full stop."""
    text = " ".join(text.split()).replace(" ,", ",").replace(" .", ".")
    return text[:1].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")
