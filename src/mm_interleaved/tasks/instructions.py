"""Instruction data in LLaVA's format, for training (docs/data_formats.md, "Instructions").

`llava_instruct` has one sample per round, as the original; the others have one per conversation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
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


def _read(
    source: Source, names: Sequence[str], make: Callable[[Conversation], Iterator[Item]], text_only: bool
) -> Iterator[Item]:
    """The items of `make` for every record; those without images are left out, unless `text_only`.

    The first of the files that exists has {id, image, conversations: [{from, value}, ...]} in a JSON list or one per
    line; `image` may be a list.
    """
    path = source.file(*names)

    def read(where: str, record: dict[str, Any], index: int) -> Iterator[Item]:
        value = record.get("image")
        if value is None and not text_only:
            return
        listed = value if isinstance(value, list) else [value]
        found = [source.images.find(name) for name in ([] if value is None else strings(listed, f"{where}, 'image'"))]
        problem = next((problem for _, problem in found if problem), "")
        images = [given(path) for path, _ in found]
        name = f"{index}-{record.get('id', '')}".rstrip("-")
        yield from make(Conversation(where, name, images, problem, *_turns(record, where)))

    return each(line_entries(path) if path.suffix == ".jsonl" else entries(read_json(path), str(path)), read)


def read_rounds(source: Source, names: Sequence[str]) -> Iterator[Item]:
    """One item per round, with all images and without the earlier rounds.

    The system message is the field `{system}`, which the default prompt does not use, as in the original.
    """

    def make(found: Conversation) -> Iterator[Item]:
        for number, (question, answer) in enumerate(found.rounds):
            question = _PLACEHOLDER.sub("", question).strip()
            fields = {"image": found.images, "question": question, "system": found.system}
            yield Item(f"{found.id}-{number}", fields, [answer], [Text(answer)], meta={"question": question},
                       problem=found.problem, place=found.where)  # fmt: skip

    return _read(source, names, make, False)


def read_conversations(source: Source, names: Sequence[str]) -> Iterator[Item]:
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

    return _read(source, names, make, source.options["text_only"] == "keep")


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


_INSTRUCT = ("llava_instruct.json",)
MIX_665K = ("llava_v1_5_mix665k.json",)
"""The mix of LLaVA 1.5 (liuhaotian/LLaVA-Instruct-150K): images as `coco/train2017/NAME`, `gqa/images/NAME`,
`ocr_vqa/images/NAME`, `textvqa/train_images/NAME` and `vg/VG_100K/NAME`; records without `image` are text alone."""
LLAVAR = ("llava_instruct_150k_llavar_20k.json", "llava_instruct_150k_llavar_16k.json", "chat_llavar.json")
"""LLaVAR (SALT-NLP/LLaVAR): the files for fine-tuning, whose images are those of `finetune.zip` and COCO's, and the one
for pre-training."""

_SHARED: dict[str, Any] = {"makes": "text", "metrics": (), "phases": ("train",)}
_LLAVA: dict[str, Any] = {"images": "llava/images", "annotations": "llava",
          "obtain": "Get a file of LLaVA's form, and the images that it names"}  # fmt: skip


def _conversations(name: str, description: str, names: Sequence[str], text_only: tuple[str, str],
                   **files: Any) -> TaskType:  # fmt: skip
    return TaskType(name, description, partial(read_conversations, names=names), prompt="{conversation}",
                    options={"text_only": text_only}, **_SHARED, **files)  # fmt: skip


TASKS = (
    TaskType("llava_instruct", "single rounds of instructions about images, for training",
             partial(read_rounds, names=_INSTRUCT), prompt=PROMPT, **_SHARED, **_LLAVA),
    _conversations("llava_conversations", "conversations about images, for training", _INSTRUCT, ("drop", "keep"),
                   **_LLAVA),
    _conversations("llava_665k", "the mix of LLaVA 1.5, with conversations about text, for training", MIX_665K,
                   ("keep", "drop"), images="llava_665k", annotations="llava_665k",
                   obtain="Get llava_v1_5_mix665k.json of LLaVA 1.5, and the five folders of images that it names"),
    _conversations("llavar", "conversations about text in images, for training", LLAVAR, ("drop", "keep"),
                   images="llavar/images", annotations="llavar",
                   obtain="Get LLaVAR's files (SALT-NLP/LLaVAR), and COCO's train2017 in one folder with its images"),
)  # fmt: skip
