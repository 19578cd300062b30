"""Questions with ten people's answers, as VQAv2, OK-VQA, TextVQA and VizWiz publish them, and GQA's with one.

v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, val2014/COCO_val2014_....jpg
OpenEnded_mscoco_val2014_questions.json, mscoco_val2014_annotations.json, val2014/...
textvqa_val_questions.json, textvqa_val_annotations.json, train_images/...
val.json, val/VizWiz_val_00000001.jpg
val_balanced_questions.json, images/1000001.jpg
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..language import UNANSWERABLE, Question, unanswerable
from .base import Format, Job, write_image, write_json

ASKED = 2  # questions of an image, at most
HEADER = {"info": {"description": "Toy world"}, "task_type": "Open-Ended", "data_type": "mscoco",
          "license": {"name": "Apache-2.0"}}  # fmt: skip


def phase(job: Job) -> str:
    """The official files have answers for two splits only."""
    return "train" if job.split == "train" else "val"


def write(
    job: Job, indices: range, folder: Path, *, image: str, asked: int = ASKED, lacking: int = 0
) -> list[tuple[int, str, Any]]:
    """Images; returns (number, image's name, questions) of each. One in `lacking` images has no answer."""
    found = []
    for index in indices:
        scene, rng = job.scene(index)
        name = image.format(phase=phase(job), number=job.number(index))
        write_image(job, scene, folder / name)
        lacks = lacking and index % lacking == lacking - 1
        found.append((job.number(index), Path(name).name,
                      [unanswerable(scene, rng)] if lacks else job.world.questions(scene, rng, asked)))  # fmt: skip
    return found


def _asked(results: list[Any]) -> list[tuple[int, int, str, Question]]:
    """(number of the question, number and name of the image, question)."""
    return [
        (10 * number + place, number, name, question)
        for batch in results
        for number, name, listed in batch
        for place, question in enumerate(listed)
    ]


def _answers(question: Question) -> list[dict[str, Any]]:
    return [
        {"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(question.answers, 1)
    ]


def finish_vqa(job: Job, results: list[Any], folder: Path, *, name: str, files: tuple[str, str]) -> None:
    """The files of questions and of annotations."""
    asked, annotations = [], []
    for number, image, file, question in _asked(results):
        record: dict[str, Any] = {"question_id": number, "image_id": image, "question": question.question}
        asked.append(record | ({"image": file} if name == "textvqa" else {}))
        record = {"question_id": number, "image_id": image, "question_type": question.type,
                "answer_type": question.answer_type, "answers": _answers(question)}  # fmt: skip
        annotations.append(record | ({"multiple_choice_answer": question.answer} if name == "vqav2" else {}))
    header = {**HEADER, "data_subtype": f"{phase(job)}2014"}
    write_json({**header, "questions": asked}, folder / files[0].format(phase=phase(job)))
    write_json({**header, "annotations": annotations}, folder / files[1].format(phase=phase(job)))


def finish_vizwiz(job: Job, results: list[Any], folder: Path) -> None:
    """One list; some images show nothing of what was asked for."""
    records = []
    for _, _, file, question in _asked(results):
        lacks = question.type == UNANSWERABLE
        records.append({"image": file, "question": question.question, "answers": _answers(question),
                        "answer_type": UNANSWERABLE if lacks else question.answer_type,
                        "answerable": int(not lacks)})  # fmt: skip
    write_json(records, folder / f"{phase(job)}.json")


def finish_gqa(job: Job, results: list[Any], folder: Path) -> None:
    """An object with a question under each id."""
    found = {
        str(number): {"imageId": str(image), "question": question.question, "answer": question.answer,
                      "types": {"structural": "query", "semantic": question.type}}
        for number, image, _, question in _asked(results)
    }  # fmt: skip
    write_json(found, folder / f"{phase(job)}_balanced_questions.json")


def _vqa(name: str, description: str, image: str, prefix: str = "", files: tuple[str, str] | None = None) -> Format:
    files = files or (f"{prefix}OpenEnded_mscoco_{{phase}}2014_questions.json",
                      f"{prefix}mscoco_{{phase}}2014_annotations.json")  # fmt: skip
    return Format(name, description, partial(write, image=image), partial(finish_vqa, name=name, files=files), 100)


_COCO = "{phase}2014/COCO_{phase}2014_{number:012d}.jpg"
_TEXTVQA = ("textvqa_{phase}_questions.json", "textvqa_{phase}_annotations.json")
FORMATS = (
    _vqa("vqav2", "questions with ten answers, as VQAv2", _COCO, "v2_"),
    _vqa("okvqa", "questions with ten answers, as OK-VQA", _COCO),
    _vqa("textvqa", "questions with ten answers, as TextVQA in VQA's form", "train_images/{number:016x}.jpg",
         files=_TEXTVQA),
    Format("vizwiz_vqa", "questions with ten answers, as VizWiz",
           partial(write, image="{phase}/VizWiz_{phase}_{number:08d}.jpg", asked=1, lacking=4), finish_vizwiz, 100),
    Format("gqa", "questions with one answer, as GQA", partial(write, image="images/{number}.jpg"), finish_gqa, 100),
)  # fmt: skip
