"""Reads the facts back out of a caption, also out of one that a model wrote and that may be wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from ..kinds import KINDS
from ..scene import GLYPHS, PARTS, Scene
from .phrases import (
    CELL_WORDS,
    COLOR_WORDS,
    GROUND_WORDS,
    RELATION_WORDS,
    SIZE_WORDS,
    TEXTURE_NOUNS,
    TEXTURE_WORDS,
    Fact,
    holds,
)
from .words import NUMBERS

MOST_MENTIONS = 10  # more than these cannot be scored as different objects of scenes of five
_ADJECTIVES = ("size", "color", "texture")

Binding = dict[int | None, int]  # from the number of a mention to that of an object


@dataclass(frozen=True)
class CaptionScore:
    """How a caption fits a scene.

    Attributes:
        stated: facts in the text.
        right: how many of them hold in the scene.
        mentioned: objects of the scene that the text speaks of.
        objects: objects in the scene.
    """

    stated: int
    right: int
    mentioned: int
    objects: int


def read_facts(text: str) -> tuple[Fact, ...]:
    """What a text states, as far as it is in the words of the grammar; other words are passed over.

    Returns:
        Facts in the order of the text. They number the objects as they are first mentioned; "the fox" and "it" are
        taken for something mentioned before where they fit.
    """
    reader = _Reader()
    for part in re.split(r"[.!?;\n]+", text):
        reader.sentence(part)
    return tuple(reader.facts)


def score_caption(text: str, scene: Scene) -> CaptionScore:
    """Compare a caption with the scene it is about.

    Mentions are taken for objects of the same kind, in the way that makes most facts right. Whatever is said of
    something that is not there is wrong.
    """
    facts = read_facts(text)
    mentions = [f for f in facts if f.name == "object"]
    best_right, best_found = -1, 0
    for bound in _bindings(mentions[:MOST_MENTIONS], scene):
        right = sum(holds(_bind(f, bound), scene) for f in facts)
        if (right, len(bound)) > (best_right, best_found):
            best_right, best_found = right, len(bound)
    return CaptionScore(len(facts), best_right, best_found, len(scene.objects))


def _bind(fact: Fact, bound: Binding) -> Fact:
    """The fact with numbers of objects instead of mentions; -1 where there is no such object."""
    obj = None if fact.obj is None else bound.get(fact.obj, -1)
    other = None if fact.other is None else bound.get(fact.other)
    return Fact(fact.name, obj, fact.value, other)


def _bindings(mentions: Sequence[Fact], scene: Scene, taken: frozenset[int] = frozenset()) -> Iterator[Binding]:
    """Every way to take mentions for different objects of their kind."""
    if not mentions:
        yield {}
        return
    first, *rest = mentions
    fitting = [i for i, t in enumerate(scene.objects) if t.attributes.kind == first.value and i not in taken]
    for index in fitting:
        for others in _bindings(rest, scene, taken | {index}):
            yield {first.obj: index, **others}
    left = sum(m.value == first.value for m in rest)
    if left >= len(fitting):  # leaving one out only helps where others may take its object
        yield from _bindings(rest, scene, taken)


@dataclass
class _Reader:
    """Goes through sentences from left to right and keeps what they state."""

    facts: dict[Fact, None] = field(default_factory=dict)
    mentions: list[dict[str, str]] = field(default_factory=list)
    current: list[int] = field(default_factory=list)  # the last objects spoken of; one, or several of a plural
    topic: int | None = None  # what "it" is

    def sentence(self, text: str) -> None:
        """Read one sentence."""
        self.adjectives: dict[str, str] = {}
        self.article = ""
        self.spoken: list[int] = []  # of this sentence, without those that others are related to
        self.relation: tuple[str, int | None] | None = None
        self.where: list[str] = []  # places said before the object that is there
        words = list(_words(text))
        for number, (name, value) in enumerate(words):
            if name == "kind":
                self._mention(value, _modifiers(words[number + 1 :]))
            elif name in _ADJECTIVES:
                self.adjectives[name] = value
            elif name == "article":
                self._settle()
                self.article = value
            elif name == "it":
                self._settle()
                if self.topic is not None:
                    self._speak([self.topic])
            elif name in ("part", "glyph", "noun"):
                self._settle()
                self._tell({"texture" if name == "noun" else name: value})
            elif name == "relation":
                self._settle()
                self.relation = (value, self.spoken[-1] if self.spoken else None)
            elif name == "cell":
                self._settle()
                self._place(value)
            else:  # of the image as a whole
                self._settle()
                self.facts[Fact(name, None, value)] = None
        self._settle()
        if self.spoken:
            self.topic = self.spoken[0]

    def _settle(self) -> None:
        """Adjectives that no noun has followed belong to what was last spoken of: "it is big and red"."""
        self._tell(self.adjectives)
        self.adjectives, self.article = {}, ""

    def _tell(self, attributes: dict[str, str]) -> None:
        for index in self.current:
            for name, value in attributes.items():
                self.mentions[index].setdefault(name, value)
                self.facts[Fact(name, index, value)] = None

    def _mention(self, kind: str, after: dict[str, str]) -> None:
        said, self.adjectives = self.adjectives, {}
        count = NUMBERS.index(self.article) if self.article in NUMBERS[2:] else 1
        known = self._known(kind, said | after) if self.article in ("the", "") else None
        if known is None:
            start = len(self.mentions)
            indices = list(range(start, start + count))
            self.mentions += [{"kind": kind} for _ in indices]
            for index in indices:
                self.facts[Fact("object", index, kind)] = None
        else:
            indices = [known]
        self.current = indices
        self._tell(said)
        self._speak(indices)

    def _known(self, kind: str, said: dict[str, str]) -> int | None:
        """The earlier mention that "the <said> <kind>" fits best."""
        fitting = [
            (sum(m.get(n) == v for n, v in said.items()), -i)
            for i, m in enumerate(self.mentions)
            if m["kind"] == kind and all(m.get(n, v) == v for n, v in said.items())
        ]
        return -max(fitting)[1] if fitting else None

    def _speak(self, indices: list[int]) -> None:
        """Note that these are spoken of: as the other end of a relation, or in their own right."""
        self.current, self.article = indices, ""
        if self.relation is None:
            self.spoken += indices
            for cell in self.where:
                self.facts[Fact("cell", indices[0], cell)] = None
            self.where = []
            return
        relation, subject = self.relation
        if subject is None:  # "left of the tree is ...": the tree comes first, then what is left of it
            self.relation = (relation, ~indices[0])
            return
        if subject < 0:
            self.facts[Fact("relation", indices[0], relation, ~subject)] = None
            self.spoken += indices
        elif subject != indices[0]:
            self.facts[Fact("relation", subject, relation, indices[0])] = None
        self.relation = None

    def _place(self, cell: str) -> None:
        if self.spoken and self.relation is None:
            self.facts[Fact("cell", self.spoken[-1], cell)] = None
        else:
            self.where.append(cell)


def _modifiers(words: list[tuple[str, str]]) -> dict[str, str]:
    """What follows a noun and belongs to it: "with stripes and a hat"."""
    found = {}
    for name, value in words:
        if name not in ("part", "glyph", "noun"):
            break
        found["texture" if name == "noun" else name] = value
    return found


def _words(text: str) -> Iterator[tuple[str, str]]:
    """The words of the lexicon in a sentence: (what it is, its value)."""
    pattern, meanings = _lexicon()
    for match in pattern.finditer(text):
        if match["glyph"] or match["glyph_on"]:
            yield "glyph", (match["glyph"] or match["glyph_on"]).upper()
        elif match["count"]:
            yield "count", str(NUMBERS.index(match["count"].lower()))
        elif match["part"]:
            yield "part", match["part"].lower()
        else:
            yield meanings[match["word"].lower()]


@cache
def _lexicon() -> tuple[re.Pattern[str], dict[str, tuple[str, str]]]:
    """A pattern that finds every expression, longest first, and what each one means."""
    meanings: dict[str, tuple[str, str]] = {"it": ("it", "")}
    for word in ("a", "an", "another", "the", *NUMBERS[1:]):
        meanings[word] = ("article", word)
    tables = [("size", SIZE_WORDS), ("color", COLOR_WORDS), ("texture", TEXTURE_WORDS), ("noun", TEXTURE_NOUNS),
              ("ground", GROUND_WORDS), ("cell", CELL_WORDS), ("relation", RELATION_WORDS)]  # fmt: skip
    for name, table in tables:
        meanings |= {word: (name, value) for value, words in table.items() for word in words}
    for kind in KINDS.values():
        meanings |= {kind.plural: ("kind", kind.name), kind.name: ("kind", kind.name)}
    glyph = f"[{GLYPHS}{GLYPHS.lower()}]"
    expressions = [
        rf"(?:the )?(?:letter|number|marked) (?P<glyph>{glyph})(?: on it)?",
        rf"an? (?P<glyph_on>{glyph}) on it",
        rf"(?P<count>{_either(NUMBERS[1:])}) things?",
        rf"(?:(?:an?|the) )?(?P<part>{_either(PARTS[1:])})s?",
        rf"(?P<word>{_either(meanings)})",
    ]
    return re.compile(rf"\b(?:{'|'.join(expressions)})\b", re.IGNORECASE), meanings


def _either(words: Iterable[str]) -> str:
    return "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))
