"""Questions about documents, charts, scene text and books in their official layouts; odd records of all such files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm_interleaved.tasks import Sample, Task, TaskConfig, make_task

from . import official
from .official import OFFICIAL

ToyTask = Callable[..., Task]


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., tuple[Path, Callable[..., list[Sample]]]]:
    """The folder of a task's files, for a test to change, and a function that reads them."""

    def make(name: str) -> tuple[Path, Callable[..., list[Sample]]]:
        OFFICIAL[name][0](tmp_path)
        folders = {"images": str(tmp_path / OFFICIAL[name][1]), "annotations": str(tmp_path)}

        def read(phase: str = "", **options: Any) -> list[Sample]:
            return list(make_task(TaskConfig(name, phase=phase, **folders, **options)).samples())

        return tmp_path, read

    return make


def shown(samples: list[Sample]) -> list[str]:
    return [Path(str(s.document.images[0].source)).name for s in samples]


def test_chartqa_reads_both_kinds_of_questions(files: Callable) -> None:
    _, read = files("chartqa")
    found = read("train")
    assert [s.meta["subset"] for s in found] == ["human"] * 2 + ["augmented"] * 2
    assert [s.id for s in found] == ["human-0", "human-1", "augmented-0", "augmented-1"]
    assert shown(found) == ["red.png", "green.png", "blue.png", "white.png"]
    assert found[0].document.segments[2].text == "How high is the red bar? The answer is:"
    assert found[0].reference == ["12.5"] == [a.text for a in found[0].answer]


@pytest.mark.parametrize("name", ["docvqa", "infovqa", "st_vqa"])
def test_a_test_without_answers(name: str, files: Callable) -> None:
    _, read = files(name)
    found = read("test")
    assert [s.reference for s in found] == [None] * 4
    assert not any(s.answer or s.problem for s in found)
    kind = make_task(TaskConfig(name)).kind
    key = "question_id" if name == "st_vqa" else "questionId"
    assert kind.submission is not None
    assert kind.submission(found[1].id, found[1].meta, "stop") == {key: int(found[1].id), "answer": "stop"}


def test_docvqa_of_another_release(files: Callable) -> None:
    """Images in one folder, and another name of the file."""
    folder, read = files("docvqa")
    (folder / "val/documents").rename(folder / "spdocvqa_images")
    (folder / "val_v1.0.json").rename(folder / "val_v1.0_withQT.json")
    found = read("val")
    assert not any(s.problem for s in found)
    assert found[0].meta["question_types"] == ["handwritten"]
    assert found[0].reference == ["2 May 1970", "May 2, 1970"]


def test_the_most_frequent_answer_is_learned(files: Callable) -> None:
    folder, read = files("st_vqa")
    path = folder / "train_task_3.json"
    path.write_text(path.read_text().replace('["stop", "STOP"]', '["go", "stop", "", "stop"]'))
    assert {s.answer[0].text for s in read("train")} == {"stop"}


def test_est_vqa_by_language(files: Callable) -> None:
    _, read = files("est_vqa")
    assert [s.meta["subset"] for s in read()] == ["en", "zh"] * 2
    for language in ("en", "zh"):
        assert [s.meta["subset"] for s in read(options={"language": language})] == [language] * 2


def test_ocrvqa_splits_and_extensions(files: Callable) -> None:
    _, read = files("ocrvqa")
    for number, phase in enumerate(("train", "val", "test"), 1):
        found = read(phase)
        assert len(found) == 8  # two questions a book
        assert shown(found)[::2] == [f"{number}00000.gif", *(f"{number}0000{i}.jpg" for i in (1, 2, 3))]
        assert [s.reference for s in found[:2]] == [["Ann Lee"], ["Yes"]]


def test_dvqa(files: Callable) -> None:
    _, read = files("dvqa")
    assert shown(read("val_hard"))[0] == "bar_val_hard_00000000.png"
    assert read("train")[0].meta["question_type"] == "data"


def change(path: Path, spoil: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    spoil(data)
    official.write(path, data)


@pytest.mark.parametrize(
    ("name", "file", "spoil", "bad", "words"),
    [
        ("chartqa", "val/val_human.json", lambda d: d[1].pop("label"), 1, "'label' is missing"),
        ("chartqa", "val/val_augmented.json", lambda d: d[0].update(query=3), 1, "must be a string"),
        ("docvqa", "val_v1.0.json", lambda d: d["data"][0].update(answers=[]), 1, "there is no reference"),
        ("docvqa", "val_v1.0.json", lambda d: d["data"][0].update(image="../x.png"), 1, "is not in"),
        ("docvqa", "val_v1.0.json", lambda d: d["data"][1].update(questionId=100), 1, "stands in"),
        ("infovqa", "infographicsVQA_val_v1.0_withQT.json", lambda d: d["data"].append(3), 1, "must be an object"),
        ("est_vqa", "annotations/train.json", lambda d: d[2].update(annotation="no"), 1, "must be a list"),
        ("ocrvqa", "dataset.json", lambda d: d["200001"]["answers"].pop(), 1, "2 questions, but 1 answers"),
        ("ocrvqa", "dataset.json", lambda d: d["200001"]["answers"].__setitem__(0, " "), 1, "there is no reference"),
        ("ocrvqa", "dataset.json", lambda d: d.update(x="no"), 1, "must be an object"),
        ("dvqa", "val_easy_qa.json", lambda d: d[0].update(answer=7), 1, "must be a string"),
        ("textcaps", "TextCaps_0.1_val.json", lambda d: d["data"][0].pop("image_id"), 1, "'image_id' is missing"),
        ("textcaps", "TextCaps_0.1_val.json", lambda d: d["data"][0].update(caption_str=1), 1, "must be a string"),
        ("vg_regions", "image_data.json", lambda d: d.pop(), 1, "image 4 is not in"),
        ("vg_regions", "image_data.json", lambda d: d.append(d[0]), 1, "stands in"),
        ("vg_regions", "region_descriptions.json", lambda d: d[0]["regions"][1].update(width=0), 1, "no area"),
        (
            "vg_regions",
            "region_descriptions.json",
            lambda d: d[0]["regions"][1].pop("phrase"),
            1,
            "'phrase' is missing",
        ),
        ("vg_regions", "region_descriptions.json", lambda d: d[0].update(regions=3), 1, "must be a list"),
        ("llava_665k", "llava_v1_5_mix665k.json", lambda d: d[4].pop("conversations"), 1, "must be a list"),
        ("llavar", "llava_instruct_150k_llavar_20k.json", lambda d: d[1]["conversations"].pop(), 1, "has no answer"),
    ],
)
def test_odd_records_are_counted_and_named(
    name: str, file: str, spoil: Callable, bad: int, words: str, files: Callable
) -> None:
    folder, read = files(name)
    phase = OFFICIAL[name][2]
    before = len(read(phase))
    change(folder / file, spoil)
    found = read(phase)
    problems = [s.problem for s in found if s.problem]
    assert len(problems) == bad
    assert words in problems[0]
    assert before - len(problems) - 1 <= len(found) - bad < before + 1
    odd = next(s for s in found if s.problem)
    assert str(folder / file) in (odd.document.place or "") + odd.problem


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("Annotations/101.xml", "<width>50", "<width>many", "not an annotation that can be read"),
        ("Annotations/101.xml", "</annotation>", "", "not an annotation that can be read"),
        ("Annotations/101.xml", "<annotation>", "<!DOCTYPE a><annotation>", "declares a document type"),
        ("Annotations/101.xml", "<xmax>26", "<xmax>76", "outside the image"),
        ("Annotations/101.xml", "<xmax>26", "<xmax>1", "is no box"),
        ("Sentences/101.txt", None, " ", "there is no reference"),
        ("Sentences/101.txt", None, None, "does not exist"),
        ("val.txt", "101", "one", "no number of an image"),
    ],
)
def test_odd_entities(file: str, old: str | None, new: str | None, words: str, files: Callable) -> None:
    """An image whose files cannot be read is named, and the others are used."""
    folder, _ = files("flickr30k_entities")
    if new is None:
        (folder / file).unlink()
    else:
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace(old, new) if old else new)
    config = TaskConfig("flickr30k_entities", phase="val", images=str(folder / "flickr30k-images"),
                        annotations=str(folder))  # fmt: skip
    found = list(make_task(config).samples())
    (problem,) = (s.problem for s in found if s.problem)
    assert len(found) == 4
    assert words in problem
