"""Official files become files that the tasks read, and the check says what is wrong with those."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mm_interleaved.data.config import SourceConfig
from mm_interleaved.data.readers import make_reader
from mm_interleaved.data.report import DataError
from mm_interleaved.io import InputError
from mm_interleaved.tasks import TASKS, Sample, Task, TaskConfig, make_task
from mm_interleaved.tasks.check import EXPECTED, check_task
from mm_interleaved.tasks.prepare import CONVERTERS, prepare

from ..conftest import make_image
from .conftest import PHASES


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def save(path: Path, size: tuple[int, int] = (60, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image(1, size).save(path)


def convert(name: str, folder: Path, phase: str = "") -> list[Sample]:
    """Convert, check, and read."""
    lines = prepare(TASKS[name], folder / "official", folder / "datasets", phase)
    assert lines
    assert all((folder.parent / line.partition(":")[0]).exists() or "still missing" in line for line in lines)
    task = make_task(TaskConfig(name, root=str(folder / "datasets"), phase=phase))
    found = check_task(task)
    assert found.good, found.problems
    return list(task.samples())


def test_flickr30k(tmp_path: Path) -> None:
    sentences = [{"raw": "A cat .", "sentid": 1}, {"raw": "One cat on a mat .", "sentid": 2}]
    write(tmp_path / "official/dataset_flickr30k.json", {"images": [
        {"split": "test", "filename": "1007.jpg", "imgid": 0, "sentences": sentences},
        {"split": "train", "filename": "1008.jpg", "imgid": 1, "sentences": sentences},
    ]})  # fmt: skip
    save(tmp_path / "datasets/flickr30k/flickr30k-images/1007.jpg")
    (sample,) = convert("flickr30k", tmp_path)
    assert (sample.id, sample.reference) == ("1007", ["A cat .", "One cat on a mat ."])
    save(tmp_path / "datasets/flickr30k/flickr30k-images/1008.jpg")
    (sample,) = convert("flickr30k", tmp_path, "train")
    assert sample.id == "1008"


def test_image2paragraph(tmp_path: Path) -> None:
    url = "https://example.org/rak248/VG_100K/{}.jpg"
    told = [{"url": url.format(n), "image_id": n, "paragraph": f" Number {n}. "} for n in (1, 2, 3, 1)]
    write(tmp_path / "official/paragraphs_v1.json", told)
    for phase, numbers in (("train", [1]), ("val", [2]), ("test", [3])):
        write(tmp_path / f"official/{phase}_split.json", numbers)
    save(tmp_path / "datasets/image2paragraph/images/VG_100K/3.jpg")
    (sample,) = convert("image2paragraph", tmp_path)
    assert sample.reference == ["Number 3."]


def test_textvqa(tmp_path: Path) -> None:
    record = {"question_id": 34602, "question": "what is the brand?", "image_id": "003a8ae2ef43b901",
              "answers": ["nokia"] * 8 + ["toshiba"] * 2}  # fmt: skip
    write(tmp_path / "official/TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [record]})
    save(tmp_path / "datasets/textvqa/train_images/003a8ae2ef43b901.jpg")
    (sample,) = convert("textvqa", tmp_path, "val")
    assert (sample.id, sample.reference) == ("34602", record["answers"])
    told = json.loads((tmp_path / "datasets/textvqa/textvqa_val_questions.json").read_text())
    assert set(told) == {"info", "task_type", "data_type", "data_subtype", "license", "questions"}


def test_textvqa_of_the_test(tmp_path: Path) -> None:
    """It has no answers, and images in another folder."""
    record = {"question_id": 34602, "question": "what is the brand?", "image_id": "003a8ae2ef43b901"}
    write(tmp_path / "official/TextVQA_0.5.1_test.json", {"dataset_type": "test", "data": [record]})
    save(tmp_path / "datasets/textvqa/test_images/003a8ae2ef43b901.jpg")
    (sample,) = convert("textvqa", tmp_path, "test")
    assert (sample.id, sample.reference, list(sample.answer)) == ("34602", None, [])


@pytest.mark.parametrize(("name", "refs"), [("refcoco", "refs(unc).p"), ("refcoco+", "refs(unc).p"),
                                            ("refcocog", "refs(umd).p")])  # fmt: skip
def test_refcoco(name: str, refs: str, tmp_path: Path) -> None:
    """Boxes are written as corners; every sentence is a sample, under its region's split."""
    folder = tmp_path / "official" / name
    write(folder / "instances.json", {
        "images": [{"id": 5, "file_name": "COCO_train2014_000000000005.jpg"}],
        "annotations": [{"id": 70, "image_id": 5, "bbox": [6.0, 4, 30, 20]}],
    })  # fmt: skip
    regions = [
        {"ann_id": 70, "image_id": 5, "split": "val", "sentences": [{"sent": "the left one"}, {"sent": "red"}],
         "file_name": "COCO_train2014_000000000005_70.jpg"},
        {"ann_id": 70, "image_id": 5, "split": "train", "sentences": [{"sent": "it"}]},
    ]  # fmt: skip
    (folder / refs).write_bytes(pickle.dumps(regions, protocol=0))
    save(tmp_path / "datasets/coco/train2014/COCO_train2014_000000000005.jpg", (60, 40))
    samples = convert(name, tmp_path, "val")
    assert [s.meta["caption"] for s in samples] == ["the left one", "red"]
    assert samples[0].reference == [99, 99, 599, 599]  # of 999, cut down
    assert len(convert(name, tmp_path, "train")) == 1


def test_refcoco_runs_nothing(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    write(tmp_path / "official/instances.json", {"images": [{"id": 5, "file_name": "a.jpg"}],
                                                 "annotations": [{"id": 7, "bbox": [1, 1, 2, 2]}]})  # fmt: skip
    (tmp_path / "official/refs(unc).p").write_bytes(pickle.dumps([Bad()]))
    with pytest.raises(InputError, match="it was not run"):
        prepare(TASKS["refcoco"], tmp_path / "official", tmp_path / "datasets", "val")
    assert not (tmp_path / "touched").exists()


def test_ade20k(tmp_path: Path) -> None:
    root = tmp_path / "datasets/ade20k/ADEChallengeData2016"
    labels = np.zeros((40, 60), np.uint8)
    labels[5:9] = 3
    (root / "annotations/validation").mkdir(parents=True)
    PIL.Image.fromarray(labels).save(root / "annotations/validation/ADE_val_1.png")
    save(root / "images/validation/ADE_val_1.jpg")
    lines = prepare(TASKS["ade20k"], root, tmp_path / "datasets", "")
    assert "still missing" in lines[1]
    write(root / "validation.json", [{"image_id": "ADE_val_1", "caption": "a room"}])
    assert len(prepare(TASKS["ade20k"], root, tmp_path / "datasets", "")) == 1
    colored = np.asarray(PIL.Image.open(root / "annotations_with_color/validation/ADE_val_1.png"))
    assert colored[6, 6].tolist() == [255, 255, 255 - 42 * 2]
    assert check_task(make_task(TaskConfig("ade20k", root=str(tmp_path / "datasets")))).good


@pytest.mark.parametrize(("name", "sis"), [("vist", ""), ("vist", "sis"), ("vist_text", "sis")])
def test_vist(name: str, sis: str, tmp_path: Path) -> None:
    """Turns of a story in their order; a story that lacks an image is left out."""

    def turn(story: str, order: int, image: str) -> list[dict[str, Any]]:
        return [{"story_id": story, "worker_arranged_photo_order": order, "photo_flickr_id": image,
                 "original_text": f"This is {image}.", "text": "this is [x] ."}]  # fmt: skip

    turns = [turn("10", 1, "b"), turn("10", 0, "a"), turn("10", 2, "c"), turn("11", 0, "a"), turn("11", 1, "gone"),
             turn("12", 0, "damaged")]  # fmt: skip
    write(tmp_path / "official" / sis / "val.story-in-sequence.json", {"images": [], "annotations": turns})
    save(tmp_path / "official/val_images/a.jpg")
    save(tmp_path / "official/images/val/b.PNG")
    save(tmp_path / "official/c.gif")
    (tmp_path / "official/damaged.gif").write_bytes(b"GIF89a")
    (sample,) = convert(name, tmp_path, "val")
    assert (sample.id, sample.meta["captions"]) == ("10", ["This is a.", "This is b.", "This is c."])


def test_flintstones(tmp_path: Path) -> None:
    """Videos become strips, and the annotations come along; a second time nothing changes."""
    clips = [f"s_01_e01_shot_{i}" for i in range(5)]
    frames = np.random.default_rng(0).integers(0, 255, (3, 128, 128, 3), dtype=np.uint8)
    official = tmp_path / "official"
    (official / "video_frames_sampled").mkdir(parents=True)
    for clip in clips:
        np.save(official / f"video_frames_sampled/{clip}.npy", frames)
    write(official / "train-val-test_split.json", {"train": [], "val": [], "test": [clips[0]]})
    write(official / "flintstones_annotations_v1-0.json",
          [{"globalID": clip, "description": f"Fred and number {i}."} for i, clip in enumerate(clips)])  # fmt: skip
    with pytest.raises(InputError, match=r"following_cache4.pkl, which is not there"):
        prepare(TASKS["flintstones"], official, tmp_path / "datasets", "")
    assert not (tmp_path / "datasets").exists()
    (official / "following_cache4.pkl").write_bytes(pickle.dumps({clips[0]: clips[1:]}))
    (sample,) = convert("flintstones", tmp_path)
    assert sample.meta["captions"] == [f"Fred and number {i}." for i in range(5)]
    strip = PIL.Image.open(tmp_path / f"datasets/flintstones/video_frames_sampled_png/{clips[1]}.png")
    assert np.array_equal(np.asarray(strip).reshape(frames.shape), frames)
    (official / "flintstones").symlink_to(".")  # the tree and the official files are one folder
    assert len(prepare(TASKS["flintstones"], official, official, "")) == 4
    np.save(official / "video_frames_sampled/s_01_e01_shot_9.npy", frames[:, :64])
    with pytest.raises(InputError, match=r"uint8 \[T, 128, 128, 3\], not uint8 \[3, 64, 128, 3\]"):
        prepare(TASKS["flintstones"], official, tmp_path / "datasets", "")


@pytest.mark.parametrize("name", CONVERTERS)
def test_missing_official_files_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        prepare(TASKS[name], tmp_path / "official", tmp_path / "datasets", "")
    (tmp_path / "official").mkdir()
    with pytest.raises(InputError, match=r"is not there|there are no") as caught:
        prepare(TASKS[name], tmp_path / "official", tmp_path / "datasets", "")
    assert "Get" in str(caught.value)
    assert not (tmp_path / "datasets").exists()


def test_what_needs_no_conversion_says_so() -> None:
    with pytest.raises(InputError, match=r"reads its files as they are.*visualqa\.org.*mmi data check vqav2"):
        prepare(TASKS["vqav2"], Path("."), Path("."), "")
    with pytest.raises(InputError, match="Phases are val, test, train"):
        prepare(TASKS["vist"], Path("."), Path("."), "dev")


class TestCheck:
    @pytest.mark.parametrize("name", ["vqav2", "coco", "visdial", "refcoco", "pororo", "ade20k", "gqa", "docvqa",
                                      "grit", "vg_regions", "llava_665k"])  # fmt: skip
    def test_whole_files(self, name: str, toy_task: Callable[..., Task]) -> None:
        found = check_task(toy_task(name))
        assert found.good
        assert found.samples >= 4
        assert found.images >= 4
        assert (found.missing, found.unreadable) == (0, 0)
        assert found.expected == EXPECTED.get((name, PHASES.get(name, "val")))

    def test_images_that_are_missing_or_damaged(self, toy_task: Callable[..., Task], tmp_path: Path) -> None:
        """A header that is no image's, an image that ends too soon, and none at all."""
        whole = toy_task("coco")
        folder = tmp_path / "coco/val2014"
        folder.mkdir(parents=True)
        sources = sorted((Path(whole.config.images) / "val2014").iterdir())
        for index, source in enumerate(sources):
            content = [b"nothing", source.read_bytes()[:-400], None, source.read_bytes()][index]
            if content is not None:
                (folder / source.name).write_bytes(content)
        found = check_task(toy_task("coco", images=str(tmp_path / "coco")))
        assert (found.missing, found.unreadable, found.samples) == (1, 2, 4)
        for index in range(3):
            assert any(sources[index].name in problem for problem in found.problems)

    def test_frames_of_stories_are_counted(self, toy_task: Callable[..., Task]) -> None:
        task = toy_task("pororo")
        clips = {path for sample in task.samples() for path in sample.meta["clips"]}
        found = check_task(task)
        assert found.images == len(clips) > 0
        assert found.frames == sum(PIL.Image.open(path).height // 128 for path in clips) > found.images

    def test_narratives_are_counted_once(self, toy_task: Callable[..., Task]) -> None:
        """Of LN-COCO, whose narratives are repeated until there are 30,000 samples."""
        task = toy_task("lncoco", limit=50)
        found = check_task(task)
        lines = (Path(str(task.config.annotations)) / "coco_val_captions.jsonl").read_text().splitlines()
        assert (found.samples, found.records, found.expected) == (50, len(lines), None)
        assert check_task(toy_task("lncoco", images="nowhere")).expected == 8_573

    @pytest.mark.parametrize(("name", "phase"), [("textvqa", "val"), ("refcoco+", "testA"), ("flickr30k", "test"),
                                                 ("vist", "test"), ("flintstones", "test")])  # fmt: skip
    def test_the_command_that_would_help_is_named(self, name: str, phase: str, tmp_path: Path) -> None:
        kind, root = TASKS[name], str(tmp_path / "my sets")
        found = check_task(make_task(TaskConfig(name, root=root, phase=phase)))
        assert [("images in this folder" in p, "needs this file" in p) for p in found.problems] == [
            (True, False),
            (False, True),
        ]
        line = f"mmi data prepare {name} --source FOLDER --root '{root}' --phase {phase}"
        assert found.command == line
        (Path(root) / kind.images).mkdir(parents=True)
        assert check_task(make_task(TaskConfig(name, root=root, phase=phase))).command == line

    def test_no_command_where_none_would_help(self, toy_task: Callable[..., Task], tmp_path: Path) -> None:
        assert check_task(make_task(TaskConfig("vqav2", root=str(tmp_path)))).command == ""
        assert check_task(toy_task("textvqa", images=str(tmp_path / "nowhere"))).command == ""

    def test_files_where_folders_are_needed(self, toy_task: Callable[..., Task], tmp_path: Path) -> None:
        file = tmp_path / "file.json"
        file.write_text("{}")
        found = check_task(toy_task("vqav2", images=str(file)))
        assert f"{file}: task 'vqav2' has its images in this folder, and this is a file" in found.problems[0]
        questions = Path(str(toy_task("vqav2").config.annotations)) / "v2_OpenEnded_mscoco_val2014_questions.json"
        found = check_task(toy_task("vqav2", annotations=str(questions)))
        assert re.search(r"needs v2_OpenEnded\S+ and v2_mscoco\S+, and this is one file", found.problems[0])
        with pytest.raises(InputError, match="this folder of official files is a file"):
            prepare(TASKS["textvqa"], file, tmp_path, "")
        with pytest.raises(DataError, match=r"file.json is a file, and a folder is needed"):
            make_reader(SourceConfig("pairs", shards=["a"], root="file.json"), tmp_path)

    def test_files_that_cannot_be_read(self, toy_task: Callable[..., Task], tmp_path: Path) -> None:
        found = check_task(toy_task("gqa", annotations=str(tmp_path)))
        assert not found.good
        assert "does not exist" in found.problems[0]
        assert "GQA" in found.fix
