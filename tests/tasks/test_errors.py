"""Bad files: what is wrong, where, and what to do; a missing image spoils its own sample only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from mm_interleaved.document import Document, Image, Text
from mm_interleaved.io import InputError
from mm_interleaved.processor import MMInterleavedProcessor
from mm_interleaved.processor.tokenizer import GUARD
from mm_interleaved.tasks import TASKS, Task, TaskConfig, make_task, render

from .conftest import FILES, PHASES, Written, first

ToyTask = Callable[..., Task]
# The files of each task, most of which are JSON.
ANNOTATIONS = {
    "coco_karpathy": ["annotations/coco_karpathy_val.json"], "flickr30k": ["test1k.token.coco_format"],
    "nocaps": ["nocaps_val_4500_captions.json"],
    "image2paragraph": ["annotations/paragraphs_coco.json", "annotations/val_split.json"],
    "vqav2": ["v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"],
    "okvqa": ["OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"],
    "textvqa": ["textvqa_val_questions.json", "textvqa_val_annotations.json"], "vizwiz_vqa": ["val.json"],
    "gqa": ["val_balanced_questions.json"],
    "visdial": ["visdial_1.0_val.json", "visdial_1.0_val_dense_annotations.json"], "refcoco": ["refcoco_val.jsonl"],
    "refcoco+": ["refcoco+_val.jsonl"], "refcocog": ["refcocog_val.jsonl"],
    "grit_grounding": ["train_grounding.jsonl"], "region_caption": ["val.json"], "region_vqa": ["vgvqa_val.jsonl"],
    "grounded_caption": ["val.jsonl"], "coco": ["annotations/captions_val2014.json"],
    "lncoco": ["coco_val_captions.jsonl"], "ade20k": ["validation.json"],
    "vist": ["annotations/val_formatted_filtered.json"], "vist_text": ["annotations/val_formatted_filtered.json"],
    "pororo": ["descriptions.npy", "img_cache4.npy", "following_cache4.npy", "train_seen_unseen_ids.npy"],
    "flintstones": ["following_cache4.pkl", "train-val-test_split.json", "flintstones_annotations_v1-0.json"],
    "llava_instruct": ["llava_instruct.json"], "llava_conversations": ["llava_instruct.json"],
    "chartqa": ["val/val_human.json", "val/val_augmented.json"], "docvqa": ["val_v1.0.json"],
    "infovqa": ["infographicsVQA_val_v1.0_withQT.json"], "st_vqa": ["train_task_3.json"],
    "est_vqa": ["annotations/train.json"], "ocrvqa": ["dataset.json"], "dvqa": ["val_easy_qa.json"],
    "textcaps": ["TextCaps_0.1_val.json"], "vg_regions": ["region_descriptions.json", "image_data.json"],
    "grit": [], "flickr30k_entities": ["val.txt"], "flickr30k_phrases": ["val.txt"],
    "llava_665k": ["llava_v1_5_mix665k.json"], "llavar": ["llava_instruct_150k_llavar_20k.json"],
}  # fmt: skip
CASES = [(name, file) for name, files in ANNOTATIONS.items() for file in files]


@pytest.fixture
def own(written: Written, tmp_path: Path) -> Callable[..., tuple[Task, Path]]:
    """A task on a copy of its files that a test may spoil."""

    def copy(name: str, **options: Any) -> tuple[Task, Path]:
        form, image_folder = FILES[name]
        phase = PHASES.get(name, "val")
        folder = tmp_path / form
        shutil.copytree(written(form, "train" if phase == "train" else "val"), folder)
        config = TaskConfig(name, images=str(folder / image_folder), annotations=str(folder), phase=phase, **options)
        return make_task(config), folder

    return copy


def test_every_task_is_spoilt() -> None:
    assert set(ANNOTATIONS) == set(TASKS)


@pytest.mark.parametrize(("name", "file"), CASES)
def test_a_missing_file(name: str, file: str, own: Callable) -> None:
    task, folder = own(name)
    (folder / file).unlink()
    with pytest.raises(InputError) as raised:
        list(task.samples())
    # Of several names that a file may have, the first is named.
    assert str(folder) in str(raised.value)
    assert Path(file).name.replace("_withQT", "") in str(raised.value).replace("_withQT", "")
    assert "does not exist" in raised.value.problem
    assert raised.value.fix == TASKS[name].obtain != ""


@pytest.mark.parametrize("content", [b"", b'{"annotations": [', b"[]", b"{}", b"3", b"[1]", b"\xff\xfe", b"[" * 9999])
@pytest.mark.parametrize(("name", "file"), CASES)
def test_a_file_of_another_layout(name: str, file: str, content: bytes, own: Callable) -> None:
    """Names the file, whatever is in it."""
    task, folder = own(name)
    (folder / file).write_bytes(content)
    if (file, content) == ("val.txt", b"3"):  # a list of one image
        return
    if name == "chartqa" and content == b"[1]":  # the other file has samples
        assert [sample.problem for sample in task.samples() if sample.problem]
        return
    with pytest.raises(InputError) as raised:
        list(task.samples())
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("name", [n for n in FILES if n not in ("pororo", "flintstones", "grit")])
def test_a_missing_image_spoils_its_sample_only(name: str, own: Callable) -> None:
    task, _ = own(name, **({"limit": 9} if name == "lncoco" else {}))
    segments = [s for sample in task.samples() for s in (*sample.document.segments, *sample.answer)]
    *_, gone = (s.source for s in segments if isinstance(s, Image) and isinstance(s.source, Path))
    gone.unlink()
    found = list(make_task(task.config).samples())
    bad = [s for s in found if s.problem]
    assert 0 < len(bad) < len(found)
    assert all(gone.name in s.problem for s in bad)
    assert len(list(task.documents())) == len(found) - len(bad)


@pytest.mark.parametrize("name", ["pororo", "flintstones"])
@pytest.mark.parametrize("content", [None, b"no image"])
def test_a_clip_that_cannot_be_read(name: str, content: bytes | None, own: Callable) -> None:
    """The sample has a problem; in the original it fails later."""
    task, folder = own(name)
    clip = sorted(folder.rglob("*.png"))[-1]
    clip.unlink()
    if content:
        clip.write_bytes(content)
    assert [clip.name in s.problem for s in task.samples()].count(True) == 1


def test_a_strip_of_another_width(own: Callable) -> None:
    task, folder = own("pororo")
    PIL.Image.new("RGB", (64, 64)).save(sorted(folder.rglob("*.png"))[0])
    assert "strip of frames of 128 x 128" in first(task).problem


def test_links_in_a_folder_of_images_are_followed(own: Callable) -> None:
    task, folder = own("coco_karpathy")
    images = next(p for p in sorted(folder.rglob("*")) if p.is_dir() and any(p.glob("*.jpg")))
    images.rename(folder / "elsewhere")
    images.symlink_to(folder / "elsewhere")
    assert [s.problem for s in task.samples() if s.problem] == []


SPOILT_TEXTS = {"vqav2": "question", "okvqa": "answer", "nocaps": "caption", "visdial": "caption",
                "refcoco": "sent", "coco": "caption", "vist": "caption", "llava_instruct": "value"}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT_TEXTS)
def test_a_lone_surrogate_spoils_its_sample_only(name: str, own: Callable) -> None:
    """Wherever the string ends up: in the prompt, the reference or the answer."""
    task, folder = own(name)
    old = f'"{SPOILT_TEXTS[name]}": "'
    path = next(folder / file for file in ANNOTATIONS[name] if old in (folder / file).read_text())
    path.write_text(path.read_text().replace(old, rf"{old}\ud83d", 1))
    problems = [s.problem for s in task.samples()]
    assert sum("lone surrogate" in problem for problem in problems) >= 1
    assert sum(not problem for problem in problems) >= 1


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "", "a\0b", "x" * 5000, "loop"])
def test_a_image_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "images" / "loop").symlink_to("loop")
    (tmp_path / "captions").write_text(json.dumps({
        "images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "a"}],
    }))  # fmt: skip
    config = TaskConfig("nocaps", images=str(tmp_path / "images"), annotations=str(tmp_path / "captions"))
    sample = first(make_task(config))
    assert sample.problem
    assert "secret" not in str(sample.document.images[0].source)


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def blank_answers(data: dict) -> None:
    for answer in data["annotations"][1]["answers"]:
        answer["answer"] = " "


def odd(task: Task) -> list[str]:
    """The problems with samples, which have ids of their own, and documents with a slot; others are left alone."""
    found = list(task.samples())
    assert len({sample.id for sample in found}) == len(found)
    assert all(any(s.is_open for s in sample.document.segments) for sample in found)
    assert len(list(task.documents())) == sum(not sample.problem for sample in found) > 0
    return [sample.problem for sample in found if sample.problem]


@pytest.mark.parametrize(
    ("name", "file", "edit", "words"),
    [
        ("coco_karpathy", 0, lambda d: d.append(d[0]), ["id 1 stands in", "record 0"]),
        ("coco_karpathy", 0, lambda d: d[2].update(caption=[]), ["record 2, 'caption'", "no reference"]),
        ("coco_karpathy", 0, lambda d: d[2].update(caption=["", " "]), ["record 2, 'caption'", "blank"]),
        ("coco_karpathy", 0, lambda d: d[1].pop("image"), ["record 1", "'image' is missing; there is caption"]),
        ("coco_karpathy", 0, lambda d: d[1].update(image="a/b.jpg"), ["record 1", "does not end in a number"]),
        ("coco_karpathy", 0, lambda d: d.__setitem__(0, 7), ["record 0", "must be an object, not a whole number"]),
        ("nocaps", 0, lambda d: d["images"].append(d["images"][0]), ["id 2000001 stands in"]),
        ("nocaps", 0, lambda d: d["images"].pop(), ["there is no image 2000004"]),
        ("nocaps", 0, lambda d: d["annotations"][0].pop("image_id"), ["record 0", "'image_id' is missing"]),
        ("image2paragraph", 1, lambda d: d.insert(0, 7), ["image 7 has no paragraph"]),
        ("image2paragraph", 1, lambda d: d.insert(1, "x"), ["record 1", "must be a whole number, not a string"]),
        ("vqav2", 1, lambda d: d["annotations"].pop(), ["has no annotation in", "Take both files from one release"]),
        ("vqav2", 1, lambda d: d["annotations"].append(d["annotations"][0]), ["20000010 stands in", "record 8"]),
        ("vqav2", 1, blank_answers, ["record 1, 'answers'", "only blank ones"]),
        ("vizwiz_vqa", 0, lambda d: d[0].pop("answers"), ["record 0", "'answers' is missing"]),
        ("vizwiz_vqa", 0, lambda d: d[0].update(answers=[{"answer": 3}]), ["must be a string, not a whole number"]),
        ("gqa", 0, lambda d: d["20000010"].update(answer=""), ["question 20000010, 'answer'", "blank"]),
        ("visdial", 0, lambda d: d["data"]["dialogs"][0].update(dialog=[]), ["'dialog'", "empty"]),
        ("visdial", 0, lambda d: d["data"]["dialogs"][0].update(image_id=5), ["image 5 is not in"]),
        ("visdial", 1, lambda d: d.pop(), ["is not in", "Take both files from one release"]),
        ("visdial", 1, lambda d: d[0].update(round_id=11), ["there is no round 11", "numbered 1 to 10"]),
        ("visdial", 1, lambda d: d[0].update(gt_relevance=[0] * 100), ["0 are not 0"]),
        ("visdial", 1, lambda d: d[0].update(gt_relevance=[1]), ["100 options"]),
        ("coco", 0, lambda d: d["images"].append({"id": 9, "file_name": "x.jpg"}), ["image 9", "no reference"]),
        ("ade20k", 0, lambda d: d[0].update(caption=None), ["'caption'", "must be a string, not null"]),
        ("region_caption", 0, lambda d: d["annotations"][0].update(bbox=[5, 5, 1, 9]), ["[5, 5, 1, 9] is no box"]),
        ("region_caption", 0, lambda d: d["annotations"][0].update(bbox=[5, True, 1, 9]), ["'bbox'[1]", "a number"]),
        ("vist", 0, lambda d: next(iter(d["annotations"].values())).clear(), ["story 2000001", "empty"]),
        ("flintstones", 1, lambda d: d["val"].append(3), ["must be a string"]),
        ("llava_instruct", 0, lambda d: d[0]["conversations"].pop(), ["record 0", "no answer"]),
        ("llava_instruct", 0, lambda d: d[0]["conversations"].reverse(), ["turn of 'human'"]),
    ],
)  # fmt: skip
def test_an_odd_record_is_named_and_the_others_are_read(
    name: str, file: int, edit: Callable[[Any], Any], words: list[str], own: Callable
) -> None:
    task, folder = own(name, **({"limit": 9} if name == "lncoco" else {}))
    change(folder / ANNOTATIONS[name][file], edit)
    (problem,) = odd(task)
    for word in (*words, str(folder)):
        assert word in problem


@pytest.mark.parametrize("name", ["refcoco", "region_vqa", "grounded_caption", "lncoco"])
@pytest.mark.parametrize("line", ["{", "3", "{}", '{"image": "\\ud83d'])
def test_an_odd_line_is_named_and_the_others_are_read(name: str, line: str, own: Callable) -> None:
    task, folder = own(name, **({"limit": 20} if name == "lncoco" else {}))
    path = folder / ANNOTATIONS[name][0]
    path.write_text(line + "\n" + path.read_text())
    (problem,) = odd(task)
    assert f"{path}, line 1" in problem


def test_all_odd_records_are_named(own: Callable) -> None:
    task, folder = own("gqa")

    def spoil(data: dict[str, Any]) -> None:
        for number in list(data)[::2]:
            data[number].pop("answer")

    change(folder / ANNOTATIONS["gqa"][0], spoil)
    found = odd(task)
    assert len(found) == 4
    assert len(set(found)) == 4


def test_files_without_a_record_that_can_be_used_are_refused(own: Callable) -> None:
    task, folder = own("visdial")
    change(folder / ANNOTATIONS["visdial"][0], lambda d: d["data"]["answers"].clear())
    with pytest.raises(InputError, match=r"none of 4 records can be used, the first is .* there is no answer"):
        list(task.samples())
    task, folder = own("nocaps")
    change(folder / ANNOTATIONS["nocaps"][0], lambda d: d["annotations"].clear())
    with pytest.raises(InputError, match="'annotations': the list is empty"):
        list(task.samples())


def test_regions_of_one_image(own: Callable) -> None:
    task, folder = own("region_caption")

    def same(data: dict[str, Any]) -> None:
        for region in data["annotations"]:
            region["image_id"] = 5

    change(folder / ANNOTATIONS["region_caption"][0], same)
    found = list(task.samples())
    assert len({sample.id for sample in found}) == len(found) == 4
    assert {sample.meta["image_id"] for sample in found} == {5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "vqa2"}, "Did you mean 'vqav2'"),
        ({"task": "xyz"}, "unknown task 'xyz'. Known: coco_karpathy"),
        ({"task": "okvqa", "phase": "test"}, "there is no phase 'test'. Phases are val, train"),
        ({"task": "vist", "options": {"contxt": "current"}}, "Did you mean 'context'"),
        ({"task": "vist", "options": {"context": "all"}}, "cannot be 'all'. Values are multi_modal"),
        ({"task": "vist", "generation": {"beams": 2}}, "unknown setting 'beams'"),
        ({"task": "vist", "generation": {"num_beams": 0}}, "num_beams must be at least 1"),
    ],
)
def test_settings_that_are_not_possible(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_task(TaskConfig(**settings))


def test_no_folder_of_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"datasets/coco: task 'vqav2' has its images in this folder, which does not"):
        next(make_task(TaskConfig("vqav2", root=str(tmp_path / "datasets"))).samples())


def test_a_confidence_that_is_no_number(toy_task: ToyTask) -> None:
    with pytest.raises(InputError, match="'confidence' must be a number, not 'high'"):
        first(toy_task("grit_grounding", options={"confidence": "high"}))


def test_task_errors_are_document_errors() -> None:
    """So the command line prints them as it prints those."""
    assert issubclass(InputError, InputError)


# ---- templates


def joined(processor: MMInterleavedProcessor, texts: list[Text]) -> str:
    """The texts as the processor joins them, without the marks that keep them plain."""
    return processor._join(texts).replace(GUARD, "")


WORDS = st.text("ab{}<> .?\n", max_size=8)


@for_all(st.lists(st.one_of(WORDS, st.just(None)), max_size=6), st.text("xy {}", max_size=6))
@settings(max_examples=200)
def test_templates_lose_nothing(processor: MMInterleavedProcessor, parts: list[str | None], value: str) -> None:
    """The segments read as the template with its fields filled in, but for white space next to images and ends."""
    escaped = "".join("{image}" if p is None else p.replace("{", "{{").replace("}", "}}") + "{word}" for p in parts)
    segments = render(escaped, {"image": Image("x"), "word": value})
    wanted = "".join("\0" if p is None else p + value for p in parts)
    wanted = "\0".join(piece.strip() for piece in wanted.split("\0"))
    found, run = "", []
    for segment in segments:
        if isinstance(segment, Image):
            found, run = found + joined(processor, run) + "\0", []
        else:
            run.append(segment)
    assert found + joined(processor, run) == wanted


def test_segments_keep_their_spaces(processor: MMInterleavedProcessor) -> None:
    segments = render("say {shots} now", {"shots": [Text("a"), Image("x"), Text("b")]})
    texts = [s for s in segments if isinstance(s, Text)]
    assert joined(processor, texts[:2]) == "say a"
    assert joined(processor, texts[2:]) == "b now"
    assert Document(segments).images == [Image("x")]
