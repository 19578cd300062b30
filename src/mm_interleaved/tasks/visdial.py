"""Visual Dialog 1.0: ranking of 100 answers in the rounds with dense annotations; training learns all answers.

Files and prompt: docs/data_formats.md, "Visual Dialog".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..document import Segment, Text
from ..io import InputError
from .base import Item, TaskType, each, given, grouped, only
from .files import Source, checked, entries, get, read_json, records

CAPTION_PROMPT = "caption: {caption}."
ROUND_PROMPT = "question: {question}? answer:"
PROMPT = f"{{image}} {CAPTION_PROMPT} {{history}}{ROUND_PROMPT}"


@dataclass(frozen=True)
class Dialogues:
    """The questions and answers that dialogues refer to by number."""

    questions: list[Any]
    answers: list[Any]

    def question(self, turn: dict[str, Any], where: str) -> str:
        """The question of a round."""
        return _text(turn, "question", self.questions, where)

    def answer(self, turn: dict[str, Any], where: str) -> str:
        """The answer of a round."""
        return _text(turn, "answer", self.answers, where)

    def option(self, number: Any, where: str) -> str:
        """A candidate answer."""
        return _text({"option": number}, "option", self.answers, where)


def read(source: Source) -> Iterator[Item]:
    """One sample per dialogue: its annotated round, with the rounds before it. Training documents learn every answer.

    The original leaves out the round directly before the annotated one, and so does `compat`. Of the dialogues for
    training, which have no dense annotations, the last round is evaluated, and its own answer alone is relevant.
    """
    path = source.file(f"visdial_1.0_{source.phase}.json")
    whole = checked(read_json(path), dict, str(path))
    data = get(whole, "data", dict, str(path))
    texts = Dialogues(*(get(data, key, list, f"{path}, 'data'") for key in ("questions", "answers")))
    dense = None if source.phase == "train" else source.file(f"visdial_1.0_{source.phase}_dense_annotations.json")
    annotated, odd = ({}, []) if dense is None else grouped(entries(read_json(dense), str(dense)), "image_id", int)

    def make(where: str, dialog: dict[str, Any], index: int) -> Iterator[Item]:
        number = get(dialog, "image_id", int, where)
        rounds = [r for _, r in records(dialog.get("dialog"), f"{where}, 'dialog'")]
        if source.training:
            yield _dialogue(source, dialog, rounds, texts, where)
        elif dense is None:
            yield _round(source, dialog, rounds, {"round_id": len(rounds)}, texts, where, where)
        else:
            place, annotation = only(annotated, number, where, f"the dialogue about image {number} is not in {dense}")
            yield _round(source, dialog, rounds, annotation, texts, where, place)

    yield from each(entries(data.get("dialogs"), f"{path}, 'dialogs'"), make)
    yield from odd


def _image(source: Source, number: int) -> tuple[Path, str]:
    """The image of a dialogue; those for training are COCO's of 2014."""
    own = f"VisualDialog_{source.phase}2018/VisualDialog_{source.phase}2018_{number:012d}.jpg"
    coco = [f"{part}2014/COCO_{part}2014_{number:012d}.jpg" for part in ("train", "val")]
    return source.images.find(*((*coco, own) if source.phase == "train" else (own,)))


def _dialogue(
    source: Source, dialog: dict[str, Any], rounds: list[dict[str, Any]], texts: Dialogues, where: str
) -> Item:
    """A whole dialogue, in which every answer is learned."""
    number = get(dialog, "image_id", int, where)
    *before, last = rounds
    history: list[Segment] = []
    for turn in before:
        asked = ROUND_PROMPT.format(question=texts.question(turn, where))
        history += [Text(asked, supervise=False, attached=bool(history)), Text(),
                    Text(". ", supervise=False, attached=True)]  # fmt: skip
    image, problem = _image(source, number)
    fields = {"image": given(image), "caption": get(dialog, "caption", str, where), "history": history,
              "question": texts.question(last, where)}  # fmt: skip
    answers = [Text(texts.answer(turn, where)) for turn in rounds]
    return Item(str(number), fields, answer=answers, problem=problem, place=where)


def _round(source: Source, dialog: dict[str, Any], rounds: list[dict[str, Any]], annotation: dict[str, Any],
           texts: Dialogues, where: str, place: str) -> Item:  # fmt: skip
    """One round with its options; without dense annotations only its own answer is relevant."""
    number = get(dialog, "image_id", int, where)
    target = get(annotation, "round_id", int, place) - 1
    if not 0 <= target < len(rounds):
        raise InputError(f"there is no round {target + 1} in the dialogue about image {number}", place,
                         f"Rounds are numbered 1 to {len(rounds)}")  # fmt: skip
    here = f"{where}, round {target + 1}"
    history = "".join(
        f"{ROUND_PROMPT.format(question=texts.question(r, where))} {texts.answer(r, where)}. "
        for r in rounds[: max(target - 1, 0) if source.compat else target]
    )
    options = tuple(texts.option(n, here) for n in get(rounds[target], "answer_options", list, here))
    right = get(rounds[target], "gt_index", int, here)
    relevance = [float(i == right) for i in range(len(options))] if source.phase == "train" else [
        float(checked(v, float, f"{place}, 'gt_relevance'[{i}]"))
        for i, v in enumerate(get(annotation, "gt_relevance", list, place))
    ]  # fmt: skip
    if len(relevance) != len(options) or not any(relevance) or not 0 <= right < len(options):
        raise InputError(f"{len(options)} options, the right one being number {right}, but {len(relevance)} "
                         f"relevances of which {sum(map(bool, relevance))} are not 0", place,
                         "Fetch both files again")  # fmt: skip
    image, problem = _image(source, number)
    fields = {"image": given(image), "caption": get(dialog, "caption", str, where), "history": history,
              "question": texts.question(rounds[target], here)}  # fmt: skip
    return Item(str(number), fields, {"relevance": relevance, "index": right}, [Text(options[right])], options,
                {"round": target + 1, "question": fields["question"]}, problem, where)  # fmt: skip


def _text(record: dict[str, Any], key: str, texts: list[Any], where: str) -> str:
    """The text whose number is the value of `key`."""
    number = get(record, key, int, where)
    if not 0 <= number < len(texts):
        raise InputError(f"there is no {key} {number}, only {len(texts)}", where, "Fetch the file again")
    return checked(texts[number], str, f"{where}, {key} {number}")


TASKS = (
    TaskType("visdial", "which answer fits in a dialogue about an image", read, makes="scores", prompt=PROMPT,
             metrics=("dialogue_ranking",), phases=("val", "train"), images="visdial", folders={"train": "coco"},
             annotations="visdial", obtain="Get dialogues, dense annotations and images of VisDial 1.0 from "
             "visualdialog.org; the images for training are COCO's train2014 and val2014"),
)  # fmt: skip
