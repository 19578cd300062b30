"""Questions about images: VQAv2, OK-VQA, TextVQA, VizWiz and GQA (docs/data_formats.md, "Questions")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..document import Text
from ..generation.settings import TEXT_PRESETS, GenerationSettings
from .base import Item, TaskType, each, given, grouped, only
from .files import Entry, Source, checked, entries, get, read_json, strings, trailing_number

PROMPT = (
    "Based on the image, please answer the question. {image}{question} Please provide an accurate answer within one "
    "word. The answer is:"
)
VIZWIZ_PROMPT = (
    "Based on the image, please answer the question. {image}{question} When the provided information is insufficient, "
    "respond with 'Unanswerable'. Please provide an accurate answer within one word. The answer is:"
)
SHORT_PROMPT = "Question: {question} Short answer:"
EXAMPLE = f"{SHORT_PROMPT} {{answer}}"
SETTINGS = GenerationSettings(text=TEXT_PRESETS["vqa"])


def coco_image(phase: str, question: dict[str, Any], where: str) -> str:
    """The path of a COCO image, by its number. All phases of the test share one folder."""
    folder = "test2015" if phase.startswith("test") else f"{phase}2014"
    return f"{folder}/COCO_{folder}_{get(question, 'image_id', int, where):012d}.jpg"


def named_image(phase: str, question: dict[str, Any], where: str) -> str:
    """The path of the image of a TextVQA question: its name, or its id with `.jpg`."""
    named = "image" in question
    return get(question, "image", str, where) if named else f"{get(question, 'image_id', str, where)}.jpg"


def read_vqa(
    questions: str, annotations: str, image: Callable[[str, dict[str, Any], str], str]
) -> Callable[[Source], Iterator[Item]]:
    """A reader of VQA's two files: questions, and annotations with ten answers each. Blind phases have questions only.

    `{phase}` and `{year}` in the names of the files are replaced.
    """

    def read(source: Source) -> Iterator[Item]:
        names = {"phase": source.phase, "year": "2015" if source.blind else "2014"}
        asked = source.file(questions.format(**names))
        answer_file = None if source.blind else source.file(annotations.format(**names))
        answers, odd = ({}, []) if answer_file is None else grouped(
            _listed(answer_file, "annotations"), "question_id", int
        )  # fmt: skip

        def make(where: str, question: dict[str, Any], index: int) -> Iterator[Item]:
            number, asks = get(question, "question_id", int, where), get(question, "question", str, where)
            path, problem = source.images.find(image(source.phase, question, where))
            fields = {"image": given(path), "question": asks}
            if answer_file is None:
                yield Item(str(number), fields, meta={"question": asks}, problem=problem, place=where)
                return
            place, annotation = only(answers, number, where, f"question {number} has no annotation in {answer_file}")
            people = _people(annotation, place)
            meta = {key: annotation[key] for key in ("question_type", "answer_type") if key in annotation}
            yield Item(str(number), fields, people, [Text(_target(annotation, people))],
                       meta={"question": asks, **meta}, problem=problem, place=where)  # fmt: skip

        yield from each(_listed(asked, "questions"), make)
        yield from odd

    return read


def _listed(path: Path, key: str) -> Iterator[Entry]:
    data = checked(read_json(path), dict, str(path))
    return entries(get(data, key, list, str(path)), f"{path}, '{key}'")


def _people(annotation: dict[str, Any], where: str) -> list[str]:
    """The answers of all annotators."""
    given_answers = get(annotation, "answers", list, where)
    texts = [
        get(checked(answer, dict, f"{where}, 'answers'[{i}]"), "answer", str, f"{where}, 'answers'[{i}]")
        for i, answer in enumerate(given_answers)
    ]
    return strings(texts, f"{where}, 'answers'")


def majority(answers: list[str]) -> str:
    """The most frequent answer that is not blank, or the first of several."""
    said = [text for text in answers if text.strip()]
    return max(said, key=said.count)


def _target(annotation: dict[str, Any], people: list[str]) -> str:
    """The training target: VQAv2's `multiple_choice_answer`, else the majority's answer."""
    chosen = annotation.get("multiple_choice_answer")
    return chosen if isinstance(chosen, str) and chosen.strip() else majority(people)


def read_vizwiz(source: Source) -> Iterator[Item]:
    """VizWiz's list; the id is the number in the image's name."""
    path = source.file(f"{source.phase}.json")

    def make(where: str, record: dict[str, Any], index: int) -> Iterator[Item]:
        name, asks = get(record, "image", str, where), get(record, "question", str, where)
        people = None if source.blind else _people(record, where)
        image, problem = source.images.find(f"{source.phase}/{name}")
        meta = {"question": asks, "image": name, "answer_type": record.get("answer_type"),
                "answerable": record.get("answerable")}  # fmt: skip
        yield Item(str(trailing_number(name, where)), {"image": given(image), "question": asks}, people,
                   [] if people is None else [Text(_target(record, people))], meta=meta, problem=problem,
                   place=where)  # fmt: skip

    return each(entries(read_json(path), str(path)), make)


def _answer_entry(number: str, meta: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {"question_id": int(number), "answer": text}


def _vizwiz_entry(number: str, meta: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {"image": meta["image"], "answer": text}


def read_gqa(source: Source) -> Iterator[Item]:
    """GQA's balanced questions: {id: {imageId, question, answer, types}}; one right answer each."""
    path = source.file(f"{source.phase}_balanced_questions.json")
    questions = checked(read_json(path), dict, str(path))
    numbers = list(questions)

    def make(where: str, record: dict[str, Any], index: int) -> Iterator[Item]:
        asks = get(record, "question", str, where)
        answer = strings([get(record, "answer", str, where)], f"{where}, 'answer'")
        image, problem = source.images.find(f"{get(record, 'imageId', str, where)}.jpg")
        types = record["types"] if isinstance(record.get("types"), dict) else {}
        meta = {"question": asks, "question_type": types.get("structural"), "answer_type": types.get("semantic")}
        yield Item(numbers[index], {"image": given(image), "question": asks}, answer[0], [Text(answer[0])], meta=meta,
                   problem=problem, place=where)  # fmt: skip

    places = {f"{path}, question {number}": value for number, value in questions.items()}
    return each(((where, partial(checked, value, dict, where)) for where, value in places.items()), make)


_SHARED: dict[str, Any] = {"makes": "text", "settings": SETTINGS, "example": EXAMPLE}
_VQA: dict[str, Any] = {"prompt": PROMPT, "metrics": ("vqa_accuracy",), "submission": _answer_entry, **_SHARED}
TASKS = (
    TaskType("vqav2", "questions about COCO images",
             read_vqa("v2_OpenEnded_mscoco_{phase}{year}_questions.json", "v2_mscoco_{phase}{year}_annotations.json",
                      coco_image),
             phases=("val", "train", "test-dev", "test"), blind={"test-dev": "", "test": ""}, images="coco",
             annotations="VQAv2", obtain="Get questions and annotations from visualqa.org", **_VQA),
    TaskType("okvqa", "questions about COCO images that need knowledge",
             read_vqa("OpenEnded_mscoco_{phase}2014_questions.json", "mscoco_{phase}2014_annotations.json",
                      coco_image),
             phases=("val", "train"), images="coco", annotations="OK-VQA",
             obtain="Get questions and annotations from okvqa.allenai.org", **_VQA),
    TaskType("textvqa", "questions about text in images",
             read_vqa("textvqa_{phase}_questions.json", "textvqa_{phase}_annotations.json", named_image),
             phases=("val", "train", "test"), blind={"test": "textvqa/test_images"},
             images="textvqa/train_images", annotations="textvqa",
             obtain="Get TextVQA 0.5.1 from textvqa.org and convert it to VQA's two files", **_VQA),
    TaskType("vizwiz_vqa", "questions that blind people asked", read_vizwiz, prompt=VIZWIZ_PROMPT,
             metrics=("vizwiz_accuracy",), phases=("val", "train", "test"), blind={"test": ""},
             submission=_vizwiz_entry, images="VizWiz", annotations="VizWiz",
             obtain="Get annotations and images from vizwiz.org", **_SHARED),
    TaskType("gqa", "questions made from scene graphs", read_gqa, prompt=PROMPT, metrics=("gqa_accuracy",),
             makes="text", settings=SETTINGS, example=EXAMPLE, phases=("testdev", "val", "train"),
             images="gqa/images", annotations="gqa", obtain="Get the balanced questions and images of GQA 1.2"),
)  # fmt: skip
