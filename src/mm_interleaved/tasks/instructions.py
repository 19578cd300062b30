"""Instruction data in LLaVA's form, for training (docs/data_formats.md, "Instructions").

`llava_instruct` makes a sample of every round, as the original does; `llava_conversations` keeps conversations whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..document import Image, Segment, Text
from .base import Item, TaskType, given
from .files import Source, TaskError, get, read_json, read_lines, records, strings
from .vqa import PROMPT

_PLACEHOLDER = re.compile(r"\n?<image>\n?")


def _with_images(source: Source) -> Iterator[tuple[str, str, Any, str, list[tuple[str, str]]]]:
    """(where, id, image, its problem, rounds) of every record that has an image; others are left out.

    The file holds {id, image, conversations: [{from, value}, ...]}, listed or a line each.
    """
    path = source.file("llava_instruct.json")
    listed = read_lines(path) if path.suffix == ".jsonl" else records(read_json(path), str(path))
    for index, (where, record) in enumerate(listed):
        if record.get("image") is not None:
            image, problem = source.images.find(get(record, "image", str, where))
            yield where, f"{index}-{record.get('id', '')}".rstrip("-"), image, problem, _rounds(record, where)


def read_rounds(source: Source) -> Iterator[Item]:
    """Every round on its own, without what was said before."""
    for where, name, image, problem, rounds in _with_images(source):
        for number, (question, answer) in enumerate(rounds):
            fields = {"image": given(image), "question": question}
            yield Item(f"{name}-{number}", fields, [answer], [Text(answer)], meta={"question": question},
                       problem=problem, place=where)  # fmt: skip


def read_conversations(source: Source) -> Iterator[Item]:
    """All rounds, with roles; what the assistant says is learned."""
    for where, name, image, problem, rounds in _with_images(source):
        segments: list[Segment] = [Image(image, supervise=False, role="user")]
        for question, _ in rounds:
            segments += [Text(question, supervise=False, role="user"), Text(role="assistant")]
        answers = [answer for _, answer in rounds]
        yield Item(name, {"conversation": segments}, answers, [Text(a, role="assistant") for a in answers],
                   problem=problem, place=where)  # fmt: skip


def _rounds(record: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """Questions and answers in turn."""
    turns = list(records(record.get("conversations"), f"{where}, 'conversations'"))
    texts = []
    for number, (place, turn) in enumerate(turns):
        speaker, wanted = get(turn, "from", str, place), ("human", "user") if number % 2 == 0 else ("gpt", "assistant")
        if speaker not in wanted:
            raise TaskError(f"'{speaker}' speaks where it is the turn of '{wanted[0]}'", place, "Reorder the turns")
        texts.append(_PLACEHOLDER.sub("", get(turn, "value", str, place)).strip())
    if len(texts) % 2:
        raise TaskError("the last question has no answer", f"{where}, 'conversations'", "Remove it, or answer it")
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    for number, (_, answer) in enumerate(pairs):
        strings([answer], f"{where}, answer {number}")
    return pairs


_SHARED: dict[str, Any] = {"makes": "text", "metrics": (), "phases": ("train",), "images": "llava/images",
                           "annotations": "llava",
                           "obtain": "Get a file of LLaVA's form, and the images that it names"}  # fmt: skip
TASKS = (
    TaskType("llava_instruct", "single rounds of instructions about images, for training", read_rounds,
             prompt=PROMPT, **_SHARED),
    TaskType("llava_conversations", "conversations about images, for training", read_conversations,
             prompt="{conversation}", **_SHARED),
)  # fmt: skip
