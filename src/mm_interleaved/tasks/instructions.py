"""Instruction data in LLaVA's form, for training (spec/data_eval 4.14).

A conversation becomes samples of one round each, as in the original; with `rounds=all` it stays one document.
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


def read(source: Source) -> Iterator[Item]:
    """{id, image, conversations: [{from, value}, ...]}, listed or a line each; those without a picture are left out."""
    path = source.file("llava_instruct.json")
    listed = read_lines(path) if path.suffix == ".jsonl" else records(read_json(path), str(path))
    for index, (where, record) in enumerate(listed):
        if record.get("image") is None:
            continue
        picture, problem = source.images.find(get(record, "image", str, where))
        name = f"{record.get('id', index)}"
        rounds = _rounds(record, where)
        meta = {"rounds": len(rounds)}
        if source.options["rounds"] == "all":
            yield _whole(f"{index}-{name}", given(picture), rounds, meta, problem, where)
            continue
        for number, (question, answer) in enumerate(rounds):
            yield Item(f"{index}-{name}-{number}", {"image": given(picture), "question": question}, [answer],
                       [Text(answer)], meta=meta, problem=problem, place=where)  # fmt: skip


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


def _whole(number: str, picture: Image, rounds: list[tuple[str, str]], meta: dict[str, Any], problem: str,
           where: str) -> Item:  # fmt: skip
    """All rounds as a conversation with roles, the answers being learned."""
    segments: list[Segment] = [Image(picture.source, supervise=False, role="user")]
    for question, _ in rounds:
        segments += [Text(question, supervise=False, role="user"), Text(role="assistant")]
    answers = [Text(answer, role="assistant") for _, answer in rounds]
    fields = {"image": picture, "question": segments}
    return Item(number, {**fields, "conversation": segments}, [a for _, a in rounds], answers, meta=meta,
                problem=problem, place=where)  # fmt: skip


TASKS = (
    TaskType("llava_instruct", "instructions about pictures, for training", read, makes="text", prompt=PROMPT,
             metrics=(), phases=("train",), options={"rounds": ("single", "all")}, images="llava/images",
             annotations="llava", obtain="Get a file of LLaVA's form, and the pictures that it names"),
)  # fmt: skip
