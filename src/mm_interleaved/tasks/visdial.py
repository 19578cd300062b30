"""Visual Dialog 1.0: ranking of 100 answers in the rounds with dense annotations.

Files and prompt: docs/data_formats.md, "Visual Dialog".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..document import Text
from ..io import InputError
from .base import Item, TaskType, each, given, grouped, only
from .files import Source, checked, entries, get, read_json, records

CAPTION_PROMPT = "caption: {caption}."
ROUND_PROMPT = "question: {question}? answer:"
PROMPT = f"{{image}} {CAPTION_PROMPT} {{history}}{ROUND_PROMPT}"


def read(source: Source) -> Iterator[Item]:
    """One sample per dialogue: its annotated round, with the rounds before it.

    The original leaves out the round directly before the annotated one, and so does `compat`.
    """
    path = source.file(f"visdial_1.0_{source.phase}.json")
    dense = source.file(f"visdial_1.0_{source.phase}_dense_annotations.json")
    whole = checked(read_json(path), dict, str(path))
    data = get(whole, "data", dict, str(path))
    questions, answers = (get(data, key, list, f"{path}, 'data'") for key in ("questions", "answers"))
    annotated, odd = grouped(entries(read_json(dense), str(dense)), "image_id", int)

    def make(where: str, dialog: dict[str, Any], index: int) -> Iterator[Item]:
        number = get(dialog, "image_id", int, where)
        place, annotation = only(annotated, number, where, f"the dialogue about image {number} is not in {dense}")
        yield _item(source, dialog, annotation, questions, answers, where, place)

    yield from each(entries(data.get("dialogs"), f"{path}, 'dialogs'"), make)
    yield from odd


def _item(source: Source, dialog: dict[str, Any], annotation: dict[str, Any], questions: list[Any],
          answers: list[Any], where: str, place: str) -> Item:  # fmt: skip
    number = get(dialog, "image_id", int, where)
    rounds = [r for _, r in records(dialog.get("dialog"), f"{where}, 'dialog'")]
    target = get(annotation, "round_id", int, place) - 1
    if not 0 <= target < len(rounds):
        raise InputError(f"there is no round {target + 1} in the dialogue about image {number}", place,
                         f"Rounds are numbered 1 to {len(rounds)}")  # fmt: skip
    here = f"{where}, round {target + 1}"
    history = "".join(
        f"{ROUND_PROMPT.format(question=_text(r, 'question', questions, where))} {_text(r, 'answer', answers, where)}. "
        for r in rounds[: max(target - 1, 0) if source.compat else target]
    )
    numbers = get(rounds[target], "answer_options", list, here)
    options = tuple(_text({"option": n}, "option", answers, here) for n in numbers)
    relevance = [
        float(checked(v, float, f"{place}, 'gt_relevance'[{i}]"))
        for i, v in enumerate(get(annotation, "gt_relevance", list, place))
    ]
    right = get(rounds[target], "gt_index", int, here)
    if len(relevance) != len(options) or not any(relevance) or not 0 <= right < len(options):
        raise InputError(f"{len(options)} options, the right one being number {right}, but {len(relevance)} "
                         f"relevances of which {sum(map(bool, relevance))} are not 0", place,
                         "Fetch both files again")  # fmt: skip
    image, problem = source.images.find(
        f"VisualDialog_{source.phase}2018/VisualDialog_{source.phase}2018_{number:012d}.jpg"
    )
    fields = {"image": given(image), "caption": get(dialog, "caption", str, where), "history": history,
              "question": _text(rounds[target], "question", questions, here)}  # fmt: skip
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
             metrics=("dialogue_ranking",), images="visdial", annotations="visdial",
             obtain="Get dialogues, dense annotations and images of VisDial 1.0 from visualdialog.org"),
)  # fmt: skip
