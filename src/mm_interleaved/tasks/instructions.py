"""Instruction data in LLaVA's format, for training (docs/data_formats.md, "Instructions").

`llava_instruct` has one sample per round, as the original; `llava_conversations` has one per conversation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..document import Image, Segment, Text
from ..io import InputError
from .base import Item, TaskType, each, given
from .files import Source, entries, get, line_entries, read_json, records, strings
from .vqa import PROMPT

_PLACEHOLDER = re.compile(r"\n?<image>\n?")
SPEAKERS = (("human", "user"), ("gpt", "assistant"))


@dataclass(frozen=True)
class Conversation:
    """A record: its place, id, images and why they cannot be used, system message, and rounds."""

    where: str
    id: str
    images: list[Image]
    problem: str
    system: str
    rounds: list[tuple[str, str]]


def _read(source: Source, make: Callable[[Conversation], Iterator[Item]]) -> Iterator[Item]:
    """The items of `make` for every record with images; others are left out.

    The file has {id, image, conversations: [{from, value}, ...]} in a JSON list or one per line; `image` may be a list.
    """
    path = source.file("llava_instruct.json")

    def read(where: str, record: dict[str, Any], index: int) -> Iterator[Item]:
        value = record.get("image")
        if value is None:
            return
        names = strings(value if isinstance(value, list) else [value], f"{where}, 'image'")
        found = [source.images.find(name) for name in names]
        problem = next((problem for _, problem in found if problem), "")
        images = [given(path) for path, _ in found]
        name = f"{index}-{record.get('id', '')}".rstrip("-")
        yield from make(Conversation(where, name, images, problem, *_turns(record, where)))

    return each(line_entries(path) if path.suffix == ".jsonl" else entries(read_json(path), str(path)), read)


def read_rounds(source: Source) -> Iterator[Item]:
    """One item per round, with all images and without the earlier rounds.

    The system message is the field `{system}`, which the default prompt does not use, as in the original.
    """

    def make(found: Conversation) -> Iterator[Item]:
        for number, (question, answer) in enumerate(found.rounds):
            question = _PLACEHOLDER.sub("", question).strip()
            fields = {"image": found.images, "question": question, "system": found.system}
            yield Item(f"{found.id}-{number}", fields, [answer], [Text(answer)], meta={"question": question},
                       problem=found.problem, place=found.where)  # fmt: skip

    return _read(source, make)


def read_conversations(source: Source) -> Iterator[Item]:
    """One item per conversation, with roles; the assistant's texts have a loss.

    Several images replace the `<image>` marks; without marks, and for a single image, images come first.
    """

    def make(found: Conversation) -> Iterator[Item]:
        images = [replace(image, role="user") for image in found.images]
        places = sum(len(_PLACEHOLDER.findall(question)) for question, _ in found.rounds)
        if len(images) > 1 and places not in (0, len(images)):
            raise InputError(f"{len(images)} images, but {places} places for them (<image>)", found.where,
                            "Write one place for each, or none")  # fmt: skip
        segments: list[Segment] = [Text(found.system, supervise=False, role="system")] if found.system else []
        if len(images) == 1 or not places:
            segments, images = [*segments, *images], []
        for question, _ in found.rounds:
            segments += _asked(question, images)
            segments.append(Text(role="assistant"))
        answers = [answer for _, answer in found.rounds]
        yield Item(found.id, {"conversation": segments}, answers, [Text(a, role="assistant") for a in answers],
                   problem=found.problem, place=found.where)  # fmt: skip

    return _read(source, make)


def _asked(question: str, images: list[Image]) -> list[Segment]:
    """A question with its `<image>` marks replaced by images from the front of `images`; "" gives an empty text."""
    if not images:
        return [Text(_PLACEHOLDER.sub("", question).strip(), supervise=False, role="user")]
    segments: list[Segment] = []
    for number, part in enumerate(_PLACEHOLDER.split(question)):
        segments += [images.pop(0)] if number else []
        segments += [Text(part.strip(), supervise=False, role="user")] if part.strip() else []
    return segments


def _turns(record: dict[str, Any], where: str) -> tuple[str, list[tuple[str, str]]]:
    """The system message ("": none), and the pairs of question and answer."""
    turns = list(records(record.get("conversations"), f"{where}, 'conversations'"))
    system = ""
    if turns[0][1].get("from") == "system":
        place, first = turns.pop(0)
        system = get(first, "value", str, place).strip()
    texts = []
    for number, (place, turn) in enumerate(turns):
        speaker, wanted = get(turn, "from", str, place), SPEAKERS[number % 2]
        if speaker not in wanted:
            raise InputError(f"'{speaker}' speaks where it is the turn of '{wanted[0]}'", place, "Reorder the turns")
        texts.append(get(turn, "value", str, place).strip())
    if not texts or len(texts) % 2:
        raise InputError("the last question has no answer", f"{where}, 'conversations'", "Remove it, or answer it")
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    for number, (_, answer) in enumerate(pairs):
        strings([answer], f"{where}, answer {number}")
    return system, pairs


_SHARED: dict[str, Any] = {"makes": "text", "metrics": (), "phases": ("train",), "images": "llava/images",
                           "annotations": "llava",
                           "obtain": "Get a file of LLaVA's form, and the images that it names"}  # fmt: skip
TASKS = (
    TaskType("llava_instruct", "single rounds of instructions about images, for training", read_rounds,
             prompt=PROMPT, **_SHARED),
    TaskType("llava_conversations", "conversations about images, for training", read_conversations,
             prompt="{conversation}", **_SHARED),
)  # fmt: skip
