"""Questions about documents, charts, scene text and book covers (docs/data_formats.md, "Documents and charts").

One reader for all of them: a `Layout` describes where the parts of a question stand in the official files.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from ..document import Text
from ..generation.settings import TEXT_PRESETS, GenerationSettings
from ..io import InputError
from .base import Item, TaskType, each, given
from .files import Entry, Source, checked, entries, get, read_json, records, strings
from .vqa import EXAMPLE, majority

PROMPT = "Based on the image, please answer the question. {image}{question} The answer is:"
SETTINGS = GenerationSettings(text=replace(TEXT_PRESETS["vqa"], max_new_tokens=32))
Record = dict[str, Any]
Split = Callable[[Source, str, Record], Iterable[Record]]
"""Returns the questions of a record, from its place."""


def _itself(source: Source, where: str, record: Record) -> Iterable[Record]:
    return [record]


@dataclass(frozen=True)
class Layout:
    """Where the parts of a question stand in the files of a data set.

    The fields with braces are templates. They may name the keys of the record, and besides them `phase`, `subset` (of
    the file), `index` (of the record in its file), `key` (of the record, if the file is an object of records), `number`
    (of the question in its record), and whatever `split` adds.

    Attributes:
        files: names of the files by subset, all of which are read. Of several names the first that exists is used.
        image: paths of the image, of which the first that exists is used.
        id: unique in the task.
        question, answers: keys; the value of `answers` is a text or a list of texts.
        records: key of the list of records; "": the file is a list of records, or an object of records.
        split: the questions of a record, for files with several in one.
        meta: keys whose values are kept, for metrics and galleries.
    """

    files: Mapping[str, tuple[str, ...]]
    image: tuple[str, ...]
    id: str
    question: str = "question"
    answers: str = "answers"
    records: str = ""
    split: Split = field(default=_itself)
    meta: tuple[str, ...] = ()


def read_questions(layout: Layout) -> Callable[[Source], Iterator[Item]]:
    """A reader of files of that layout. Blind phases have no answers."""

    def read(source: Source) -> Iterator[Item]:
        for subset, names in layout.files.items():
            path = source.file(*(name.format(phase=source.phase) for name in names))
            known = {"phase": source.phase, "subset": subset}

            def make(where: str, record: Record, index: int, known: Record = known) -> Iterator[Item]:
                for number, part in enumerate(layout.split(source, where, known | {"index": index} | record)):
                    try:
                        yield _item(source, layout, where, {"number": number} | part)
                    except InputError as error:
                        yield Item.unusable(f"{where}, question {number}", str(error))

            yield from each(_entries(read_json(path), layout, str(path)), make)

    return read


def _entries(data: Any, layout: Layout, where: str) -> Iterator[Entry]:
    """The records of a file, with their keys if it is an object of records."""
    if layout.records:
        return entries(get(checked(data, dict, where), layout.records, list, where), f"{where}, '{layout.records}'")
    if not isinstance(data, dict):
        return entries(data, where)
    if not data:
        raise InputError("there are no records", where, "Fetch the file again")
    places = ((f"{where}, record '{key}'", key, value) for key, value in data.items())
    return ((place, partial(_keyed, place, key, value)) for place, key, value in places)


def _keyed(where: str, key: str, value: Any) -> Record:
    return {"key": key} | checked(value, dict, where)


def _item(source: Source, layout: Layout, where: str, record: Record) -> Item:
    asks = get(record, layout.question, str, where).strip()
    answers = None
    if not source.blind:
        value = record.get(layout.answers)
        listed = value if isinstance(value, list) else [get(record, layout.answers, str, where)]
        answers = [text.strip() for text in strings(listed, f"{where}, '{layout.answers}'")]
    path, problem = source.images.find(*(_fill(template, record, where) for template in layout.image))
    meta = {key: record[key] for key in layout.meta if key in record} | {"question": asks}
    if record["subset"]:
        meta["subset"] = record["subset"]
    return Item(_fill(layout.id, record, where), {"image": given(path), "question": asks}, answers,
                [] if answers is None else [Text(majority(answers))], meta=meta, problem=problem,
                place=where)  # fmt: skip


def _fill(template: str, record: Record, where: str) -> str:
    """The template with the values of a record, which must be strings or integers."""
    values = {}
    for _, name, _, _ in string.Formatter().parse(template):
        if name is not None:
            whole = isinstance(record.get(name), int)
            values[name] = get(record, name, int if whole else str, where)
    return template.format(**values)


# ---- the data sets

CHARTQA = Layout(
    {name: (f"{{phase}}/{{phase}}_{name}.json",) for name in ("human", "augmented")},
    image=("{phase}/png/{imgname}",), id="{subset}-{index}", question="query", answers="label",
)  # fmt: skip
"""ChartQA, as its repository (vis-nlp/ChartQA) has it: a folder for each split with `png/`, and for the questions of
people and of a machine a list of {imgname, query, label}."""

DOCVQA = Layout(
    {"": ("{phase}_v1.0_withQT.json", "{phase}_v1.0.json")},
    image=("{phase}/{image}", "{image}", "spdocvqa_images/{name}"), id="{questionId}", records="data",
    split=lambda source, where, record: [record | {"name": PurePosixPath(get(record, "image", str, where)).name}],
    meta=("question_types",),
)  # fmt: skip
"""DocVQA 1.0, task 1, as the Robust Reading Competition publishes it: {dataset_name, dataset_version, dataset_split,
data: [{questionId, question, question_types, image: "documents/NAME.png", docId, ucsf_document_id,
ucsf_document_page_no, answers, data_split}]}. `answers` is missing in the test. Images are in `{phase}/documents/`, or
in `spdocvqa_images/` in later releases."""

INFOVQA = Layout(
    {"": ("infographicsVQA_{phase}_v1.0_withQT.json", "infographicsVQA_{phase}_v1.0.json")},
    image=("infographicsvqa_images/{image_local_name}", "{image_local_name}"), id="{questionId}", records="data",
    meta=("answer_type",),
)  # fmt: skip
"""InfographicVQA 1.0, from the same place: data: [{questionId, question, image_local_name, image_url, ocr_output_file,
answers, data_split}], in the validation also `answer_type`, `evidence` and `operation/reasoning`."""

ST_VQA = Layout(
    {"": ("{phase}_task_3.json",)}, image=("{file_path}", "{phase}_imgs/{file_path}"), id="{question_id}",
    records="data",
)  # fmt: skip
"""ST-VQA, task 3 (open dictionary), as the Robust Reading Competition publishes it: {data: [{question_id, question,
answers, file_path: "coco-text/NAME.jpg", file_name, dataset, set_name, ...}]}. `answers` is missing in the test."""


def _evidence(source: Source, where: str, record: Record) -> Iterator[Record]:
    """The questions of an image of EST-VQA, perhaps of one language alone."""
    for place, part in records(record.get("annotation"), f"{where}, 'annotation'"):
        language = "zh" if re.search("[\u4e00-\u9fa5]", get(part, "question", str, place)) else "en"
        if source.options["language"] in ("all", language):
            yield record | part | {"subset": language}


EST_VQA = Layout(
    {"": ("train.json", "annotations/train.json")}, image=("images/train/{image}", "train/{image}", "{image}"),
    id="{index}-{number}", answers="answer", split=_evidence,
)  # fmt: skip
"""EST-VQA's training file, as other projects read it: [{image, annotation: [{question, answer, evidence, ...}]}]. A
question is Chinese if it has a Chinese character, as in the official evaluation (xinke-wang/EST-VQA). That evaluation
counts an answer only if its place in the image is right too, and maps traditional characters to simplified ones; here
the text alone is scored, as it is."""

BOOK_SPLITS = {"train": 1, "val": 2, "test": 3}


def _books(source: Source, where: str, record: Record) -> Iterator[Record]:
    """The questions about a book cover of the phase."""
    if get(record, "split", int, where) != BOOK_SPLITS[source.phase]:
        return
    extension = PurePosixPath(get(record, "imageURL", str, where)).suffix
    questions, answers = (get(record, key, list, where) for key in ("questions", "answers"))
    if len(questions) != len(answers):
        raise InputError(f"{len(questions)} questions, but {len(answers)} answers", where, "Fetch the file again")
    for question, answer in zip(questions, answers, strict=True):
        yield record | {"question": question, "answer": answer, "extension": extension}


OCR_VQA = Layout({"": ("dataset.json",)}, image=("images/{key}{extension}", "images/{key}.jpg"), id="{key}-{number}",
                 answers="answer", split=_books)  # fmt: skip
"""OCR-VQA's `dataset.json` (ocr-vqa.github.io): {id: {imageURL, questions, answers, title, authorName, genre, split}},
split 1, 2, 3 for train, validation and test. The official program saves images as `images/{id}` with the extension of
the URL."""

DVQA = Layout({"": ("{phase}_qa.json", "qa/{phase}_qa.json")}, image=("images/{image}",), id="{question_id}",
              answers="answer", meta=("question_type", "template_id"))  # fmt: skip
"""DVQA (kushalkafle/DVQA_dataset): [{image: "bar_train_00000001.png", question, answer, question_type, bbox_answer,
question_id}] in a file for each of `train`, `val_easy` and `val_hard`; all images are in one folder."""


def _document_entry(number: str, meta: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {"questionId": int(number), "answer": text}


def _scene_entry(number: str, meta: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {"question_id": int(number), "answer": text}


_SHARED: dict[str, Any] = {"makes": "text", "prompt": PROMPT, "settings": SETTINGS, "example": EXAMPLE}
_RRC = "from rrc.cvc.uab.es (Robust Reading Competition)"
TASKS = (
    TaskType("chartqa", "questions about charts", read_questions(CHARTQA), metrics=("relaxed_accuracy",),
             phases=("test", "val", "train"), images="chartqa", annotations="chartqa",
             obtain="Get the folder 'ChartQA Dataset' of github.com/vis-nlp/ChartQA", **_SHARED),
    TaskType("docvqa", "questions about scanned documents", read_questions(DOCVQA), metrics=("anls",),
             phases=("val", "train", "test"), blind={"test": ""}, submission=_document_entry, images="docvqa",
             annotations="docvqa", obtain=f"Get DocVQA 1.0 (task 1) {_RRC}", **_SHARED),
    TaskType("infovqa", "questions about infographics", read_questions(INFOVQA), metrics=("anls",),
             phases=("val", "train", "test"), blind={"test": ""}, submission=_document_entry, images="infovqa",
             annotations="infovqa", obtain=f"Get InfographicVQA 1.0 {_RRC}", **_SHARED),
    TaskType("st_vqa", "questions about scene text", read_questions(ST_VQA), metrics=("anls",),
             phases=("test", "train"), blind={"test": ""}, submission=_scene_entry, images="st_vqa",
             annotations="st_vqa", obtain=f"Get ST-VQA (task 3) {_RRC}", **_SHARED),
    TaskType("est_vqa", "English and Chinese questions about scene text", read_questions(EST_VQA), metrics=("anls",),
             phases=("train",), options={"language": ("all", "en", "zh")}, images="est_vqa", annotations="est_vqa",
             obtain="Get annotations and images for training from github.com/xinke-wang/EST-VQA", **_SHARED),
    TaskType("ocrvqa", "questions about book covers", read_questions(OCR_VQA), metrics=("exact_match",),
             phases=("test", "val", "train"), images="ocrvqa", annotations="ocrvqa",
             obtain="Get dataset.json and the images from ocr-vqa.github.io", **_SHARED),
    TaskType("dvqa", "questions about drawn bar charts", read_questions(DVQA), metrics=("exact_match",),
             phases=("val_easy", "val_hard", "train"), images="dvqa", annotations="dvqa",
             obtain="Get questions and images from github.com/kushalkafle/DVQA_dataset", **_SHARED),
)  # fmt: skip
