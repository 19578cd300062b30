"""Each task reads what the toy world wrote in its official layout: answers, boxes, images."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mm_interleaved import MMInterleavedProcessor
from mm_interleaved.document import Image, Text
from mm_interleaved.io import InputError
from mm_interleaved.io.images import open_image
from mm_interleaved.tasks import Sample, Task, TaskConfig, make_task
from mm_interleaved.tasks.ade20k import color_maps
from mm_interleaved.tasks.stories import FLINTSTONES, PORORO, tidy
from toyworld.draw import boxes, draw, label_map
from toyworld.language import score_caption

from .conftest import COUNT, FILES, SIZE, Written, first, scene

ToyTask = Callable[..., Task]


def samples(task: Task) -> list[Sample]:
    found = list(task.samples())
    assert not any(s.problem for s in found)
    return found


def shows(source: object, index: int, split: str = "val") -> bool:
    """Whether it is the image of the toy world's scene of that number, but for JPEG's losses."""
    image = source if isinstance(source, PIL.Image.Image) else PIL.Image.open(source)
    wanted = np.asarray(draw(scene(index, split), SIZE), np.float32)
    return image.size == (SIZE, SIZE) and np.abs(np.asarray(image.convert("RGB"), np.float32) - wanted).mean() < 4


@pytest.mark.parametrize("name", FILES)
def test_samples_have_what_they_need(name: str, toy_task: ToyTask) -> None:
    """Unique ids, images that are there, a slot to fill, the same every time; `limit` takes the first."""
    found = samples(toy_task(name, limit=9))
    assert len(found) >= (1 if name == "grit_grounding" else 4)
    assert len({s.id for s in found}) == len(found)
    kind = Image if toy_task(name).makes == "image" else Text
    for sample in found:
        assert sum(s.is_open for s in sample.document.segments) == len(sample.answer) >= 1
        assert isinstance(sample.document.segments[-1], kind)
        assert sample.document.segments[-1].is_open
        assert sample.reference
        assert sample.document.place
        for image in sample.document.images:
            assert image.is_open or open_image(image.source).size  # type: ignore[arg-type]
    again = list(toy_task(name, limit=2).samples())
    assert [s.id for s in again] == [s.id for s in found[:2]]
    assert [s.reference for s in again] == [s.reference for s in found[:2]]


@pytest.mark.parametrize("name", FILES)
def test_training_documents(name: str, toy_task: ToyTask, processor: MMInterleavedProcessor) -> None:
    """What fills the slots is learned, images that are given are not; the processor takes them as they are."""
    task = toy_task(name, limit=2)
    for sample, document in zip(task.samples(), task.documents(), strict=True):
        assert not any(s.is_open for s in document.segments)
        learned = [s for s in document.segments if s.supervise]
        assert list(sample.answer) == learned
        batch = processor(document, training=True, max_length=2048)
        assert (batch.labels != -100).any()


@pytest.mark.parametrize("name", ["coco_karpathy", "flickr30k", "nocaps", "image2paragraph"])
def test_captions(name: str, toy_task: ToyTask) -> None:
    for index, sample in enumerate(samples(toy_task(name))):
        assert shows(sample.document.images[0].source, index)
        assert len(sample.reference) == {"nocaps": 10, "image2paragraph": 1}.get(name, 5)
        for text in sample.reference:
            score = score_caption(text, scene(index))
            assert score.stated == score.right > 0


def test_nocaps_has_domains(toy_task: ToyTask) -> None:
    domains = [s.meta["domain"] for s in samples(toy_task("nocaps"))]
    assert domains == ["in-domain", "near-domain", "out-domain", "in-domain"]


def test_captions_one_a_record(toy_task: ToyTask, written: Written, tmp_path: Path) -> None:
    """BLIP's file for training lists an image once for each caption."""
    listed = json.loads((written("coco") / "annotations/coco_karpathy_val.json").read_text())
    flat = [{"image": r["image"], "caption": c, "image_id": "coco_1"} for r in listed for c in r["caption"]]
    (tmp_path / "coco_karpathy_val.json").write_text(json.dumps(flat))
    found = samples(toy_task("coco_karpathy", annotations=str(tmp_path / "coco_karpathy_val.json")))
    assert len(found) == 5 * COUNT
    assert [s.reference for s in found[:5]] == [[c] for c in listed[0]["caption"]]


def test_all_paragraphs_of_an_image_are_references(written: Written, tmp_path: Path) -> None:
    """A few images have two."""
    folder = tmp_path / "paragraphs"
    shutil.copytree(written("image2paragraph"), folder)
    path = folder / "annotations/paragraphs_coco.json"
    data = json.loads(path.read_text())
    data["annotations"].append(data["annotations"][0] | {"id": 99, "caption": "Another one."})
    path.write_text(json.dumps(data))
    config = TaskConfig("image2paragraph", images=str(folder / "images"), annotations=str(folder), phase="val")
    found = samples(make_task(config))
    assert len(found) == COUNT
    assert found[0].reference == [data["annotations"][0]["caption"], "Another one."]
    assert [len(s.reference) for s in found[1:]] == [1] * (COUNT - 1)


@pytest.mark.parametrize("name", ["vqav2", "okvqa", "textvqa", "vizwiz_vqa", "gqa"])
def test_questions(name: str, toy_task: ToyTask) -> None:
    """Two questions an image (VizWiz: one); the answer to learn is what most people said."""
    for index, sample in enumerate(samples(toy_task(name))):
        assert shows(sample.document.images[0].source, index if name == "vizwiz_vqa" else index // 2)
        answer = sample.answer[0].text
        if name == "gqa":
            assert sample.reference == answer
            continue
        assert len(sample.reference) == 10
        assert sample.reference.count(answer) >= 5
        assert sample.meta["answer_type"] in ("yes/no", "number", "other", "unanswerable")
    if name == "vizwiz_vqa":
        assert sample.reference == ["unanswerable"] * 10


@pytest.mark.parametrize(
    ("people", "chosen", "learned"),
    [
        (["a cat", "dog", "dog", "cat"], None, "dog"),
        (["cat", "dog"], None, "cat"),  # of equals the first
        (["", " ", "", "dog"], None, "dog"),
        (["dog", "dog", "cat"], "cat", "cat"),  # VQAv2 names it
        (["dog", "dog", "cat"], " ", "dog"),
    ],
)
@pytest.mark.parametrize("name", ["vqav2", "okvqa", "textvqa", "vizwiz_vqa"])
def test_the_majority_is_learned(
    name: str, people: list[str], chosen: str | None, learned: str, written: Written, tmp_path: Path
) -> None:
    folder = tmp_path / name
    shutil.copytree(written(FILES[name][0]), folder)
    (path,) = folder.glob("*annotations.json") if name != "vizwiz_vqa" else folder.glob("val.json")
    data = json.loads(path.read_text())
    for record in data if name == "vizwiz_vqa" else data["annotations"]:
        record["answers"] = [{"answer": text, "answer_id": i} for i, text in enumerate(people)]
        record["multiple_choice_answer"] = chosen
    path.write_text(json.dumps(data))
    config = TaskConfig(name, images=str(folder / FILES[name][1]), annotations=str(folder), phase="val")
    assert {s.answer[0].text for s in samples(make_task(config))} == {learned}


def test_textvqa_in_the_form_of_vqa(written: Written, tmp_path: Path) -> None:
    """Questions have an `image_id` and no `image`."""
    folder = tmp_path / "textvqa"
    shutil.copytree(written("textvqa"), folder)
    path = folder / "textvqa_val_questions.json"
    data = json.loads(path.read_text())
    names = [question.pop("image") for question in data["questions"]]
    for question, name in zip(data["questions"], names, strict=True):
        question["image_id"] = f"id-{Path(name).stem}"
        target = folder / "train_images" / f"id-{Path(name).stem}.jpg"
        if not target.exists():
            target.symlink_to(name)
    path.write_text(json.dumps(data))
    task = make_task(TaskConfig("textvqa", images=str(folder / "train_images"), annotations=str(folder)))
    found = samples(task)
    assert [Path(str(s.document.images[0].source)).stem for s in found] == [f"id-{Path(name).stem}" for name in names]


def test_visdial(toy_task: ToyTask) -> None:
    for index, sample in enumerate(samples(toy_task("visdial"))):
        assert shows(sample.document.images[0].source, index)
        relevance, right = sample.reference["relevance"], sample.reference["index"]
        assert len(sample.options) == len(set(sample.options)) == len(relevance) == 100
        assert relevance[right] == 1.0 == max(relevance)
        assert sample.answer == [Text(sample.options[right])]
        # The text speaks of this image.
        caption = re.match("caption: (.*?) question: ", sample.document.segments[1].text)[1]
        score = score_caption(caption, scene(index))
        assert score.stated == score.right > 0


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog", "region_caption", "region_vqa"])
def test_boxes(name: str, toy_task: ToyTask) -> None:
    """In thousandths, cut down; they are boxes of objects that are there."""
    for index, sample in enumerate(samples(toy_task(name))):
        assert shows(sample.document.images[0].source, index)
        there = [[int(v / SIZE * 999) for v in box] for box in boxes(scene(index), SIZE)]
        box = sample.reference if name.startswith("refcoco") else sample.meta["box"]
        assert box in there
        if name.startswith("refcoco"):
            x1, y1, x2, y2 = box
            (answer,) = sample.answer
            assert (answer.text, answer.attached) == (f"({x1:03d},{y1:03d})({x2:03d},{y2:03d})</box>", True)
            assert (sample.meta["width"], sample.meta["height"]) == (SIZE, SIZE)


def test_boxes_of_wide_images(toy_task: ToyTask, tmp_path: Path) -> None:
    """Each side counts in thousandths of its own length."""
    PIL.Image.new("RGB", (200, 50)).save(tmp_path / "a.png")
    (tmp_path / "refcoco_val.jsonl").write_text(json.dumps({"image": "a.png", "bbox": [20, 5, 100, 50], "sent": "it"}))
    assert first(toy_task("refcoco", images=str(tmp_path), annotations=str(tmp_path))).reference == [99, 99, 499, 999]


def test_the_parts_of_refcoco(toy_task: ToyTask) -> None:
    parts = [samples(toy_task("refcoco", "test", phase=phase)) for phase in ("testA", "testB")]
    assert [len(part) for part in parts] == [2, 2]
    assert [shows(part[0].document.images[0].source, i, "test") for part, i in zip(parts, (0, 2), strict=True)]


def test_unsure_boxes_are_skipped(toy_task: ToyTask) -> None:
    everything = samples(toy_task("grit_grounding"))
    sure = samples(toy_task("grit_grounding", options={"confidence": "0.75"}))
    assert 0 < len(sure) < len(everything) == COUNT


def test_grounded_captions_are_in_thousandths(toy_task: ToyTask) -> None:
    for index, sample in enumerate(samples(toy_task("grounded_caption"))):
        found = re.findall(r"<box>\((\d{3}),(\d{3})\)\((\d{3}),(\d{3})\)</box>", sample.reference[0])
        there = [[int(v / SIZE * 999) for v in box] for box in boxes(scene(index), SIZE)]
        assert [[int(v) for v in sides] for sides in found] == there


@pytest.mark.parametrize("name", ["coco", "lncoco"])
def test_text_to_image(name: str, toy_task: ToyTask) -> None:
    found = samples(toy_task(name, limit=6))
    for index, sample in enumerate(found[:4]):
        text, slot = sample.document.segments
        assert slot == Image()
        image = index if name == "coco" else [0, 1, 1, 2][index]
        assert shows(sample.reference[0], image)
        assert text.text == (text.text.lower() if name == "coco" else text.text)
        assert sample.answer == [Image(Path(sample.reference[0]))]


def test_narratives_are_drawn_again_by_a_seed(toy_task: ToyTask) -> None:
    """The same on every process; images come equally often, whatever their number of narratives."""

    def images(seed: int) -> list[str]:
        return [s.reference[0] for s in toy_task("lncoco", limit=2000, seed=seed).samples()]

    one = images(0)
    assert len(one) == 2000
    assert one == images(0) != images(1)
    assert len(set(one[:6])) == COUNT  # first every narrative, once
    counts = [one[6:].count(name) for name in set(one)]
    assert max(counts) < 1.2 * min(counts)


def test_ade20k(toy_task: ToyTask, written: Written, tmp_path: Path) -> None:
    for index, sample in enumerate(samples(toy_task("ade20k"))):
        colored, text, slot = sample.document.segments
        labels = np.asarray(PIL.Image.open(sample.reference["labels"]))
        assert (labels == label_map(scene(index), SIZE)).all()
        assert shows(sample.reference["photo"], index)
        # The preparation's formula, by hand.
        j = labels.astype(int) - 1
        wanted = np.stack([255 - 42 * (j // 36), 255 - 42 * (j % 36 // 6), 255 - 42 * (j % 6)], -1)
        assert (np.asarray(PIL.Image.open(colored.source)) == wanted).all()
        assert text.text.endswith(".")
        assert slot == Image()
        assert sample.reference["fit"] == "center"
    swapped = first(toy_task("ade20k", options={"layout": "text_first"}, compat=True))
    assert [type(s) for s in swapped.document.segments] == [Text, Image, Image]
    assert swapped.reference["fit"] == "stretch"


def test_label_maps_are_colored(written: Written, tmp_path: Path) -> None:
    there = written("ade20k")
    (tmp_path / "annotations").symlink_to(there / "annotations")
    assert color_maps(tmp_path, "validation") == COUNT
    for path in (there / "annotations_with_color/validation").iterdir():
        made = np.asarray(PIL.Image.open(tmp_path / "annotations_with_color/validation" / path.name))
        assert (made == np.asarray(PIL.Image.open(path))).all()
    assert color_maps(tmp_path, "validation") == COUNT  # and again, with nothing to do


def kinds(sample: Sample) -> str:
    """T: a text, I: a given image, t and i: slots."""
    letters = {(Text, False): "T", (Image, False): "I", (Text, True): "t", (Image, True): "i"}
    return "".join(letters[type(s), s.is_open] for s in sample.document.segments)


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("vist", {}, "TITITITITi"),
        ("vist", {"context": "image_only"}, "IIIIi"),
        ("vist", {"context": "text_only"}, "TTTTTi"),
        ("vist", {"context": "current"}, "Ti"),
        ("vist", {"protocol": "autoregressive"}, "TITiTiTiTi"),
        ("vist_text", {}, "TITITITIIt"),
        ("vist_text", {"context": "image_only"}, "IIIIIt"),
        ("vist_text", {"context": "text_only"}, "TTTTt"),
        ("vist_text", {"context": "current"}, "It"),
        ("pororo", {}, "TITiTiTiTi"),
        ("pororo", {"protocol": "last"}, "TITITITITi"),
        ("flintstones", {}, "TITiTiTiTi"),
    ],
)
def test_protocols(name: str, options: dict[str, str], wanted: str, toy_task: ToyTask) -> None:
    for sample in samples(toy_task(name, options=options)):
        assert kinds(sample) == wanted
        assert len(sample.reference) == wanted.count("i") + wanted.count("t") == len(sample.answer)


@pytest.mark.parametrize(
    ("context", "compat", "wanted"),
    [("multi_modal", False, [2, 3, 4, 5]), ("current", False, [1, 2, 3, 4, 5]), ("multi_modal", True, [1, 2, 3, 4])],
)
def test_every_beginning_of_a_story(context: str, compat: bool, wanted: list[int], toy_task: ToyTask) -> None:
    """With `compat` never the whole story, as in the original."""
    task = toy_task("vist", options={"rounds": "all", "context": context}, compat=compat)
    found = list(islice(task.samples(), len(wanted)))
    assert [len(s.meta["captions"]) for s in found] == wanted
    assert [s.id.split("-")[1] for s in found] == [str(n) for n in wanted]


def test_turns_are_in_their_order(toy_task: ToyTask) -> None:
    for sample in samples(toy_task("vist")):
        names = [Path(str(i.source)).stem for i in sample.document.images[:-1]] + [Path(sample.reference[0]).stem]
        assert names == sorted(names)


@pytest.mark.parametrize("name", ["pororo", "flintstones"])
def test_one_frame_of_each_clip(name: str, toy_task: ToyTask, written: Written) -> None:
    """Frames do not change from one reading to the next."""
    found, again, other = (samples(toy_task(name, seed=seed)) for seed in (0, 0, 1))
    assert [s.meta["frames"] for s in found] == [s.meta["frames"] for s in again] != [s.meta["frames"] for s in other]
    strips = {p.name: np.asarray(PIL.Image.open(p)) for p in written(name).rglob("*.png")}
    for sample in found:
        for image, frame in zip(sample.reference, sample.meta["frames"][1:], strict=True):
            assert image.size == (128, 128)
            frames = (strip[128 * frame : 128 * (frame + 1)] for strip in strips.values())
            assert any(np.array_equal(np.asarray(image), one) for one in frames)
    assert {f for s in found for f in s.meta["frames"]} > {0}


def test_names_keep_their_capitals(toy_task: ToyTask) -> None:
    assert tidy(" PORORO and crong\tsit.\n", PORORO) == "Pororo and Crongsit."
    assert tidy("fred meets Mr. SLATE", FLINTSTONES) == "Fred meets mr. Slate"
    assert any("Fred" in c and c == tidy(c, FLINTSTONES) for c in first(toy_task("flintstones")).meta["captions"])


def test_instructions(toy_task: ToyTask, written: Written) -> None:
    """A round is a sample; records without an image are left out; placeholders and their line breaks are gone."""
    records = json.loads((written("llava", "train") / "llava_instruct.json").read_text())
    rounds = [r["conversations"][i : i + 2] for r in records if "image" in r
              for i in range(0, len(r["conversations"]), 2)]  # fmt: skip
    found = samples(toy_task("llava_instruct"))
    assert len(found) == len(rounds)
    for sample, (human, gpt) in zip(found, rounds, strict=True):
        assert sample.meta["question"] == human["value"].replace("<image>", "").strip()
        assert sample.reference == [gpt["value"]]
        assert "<image>" not in sample.document.segments[2].text


RECORD = {"id": "r", "conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A fox."}]}


@pytest.fixture
def llava(tmp_path: Path) -> Callable[..., list[Sample]]:
    """The samples of one record."""

    def read(name: str, record: dict) -> list[Sample]:
        for image in "abc":
            PIL.Image.new("RGB", (8, 8)).save(tmp_path / f"{image}.png")
        (tmp_path / "llava.json").write_text(json.dumps([record]))
        config = TaskConfig(name, images=str(tmp_path), annotations=str(tmp_path / "llava.json"))
        return list(make_task(config).samples())

    return read


def shown(sample: Sample) -> list[tuple[str | None, str]]:
    """Roles, and texts or names of images; a slot is "?"."""
    return [(s.role, "?" if s.is_open else s.text if isinstance(s, Text) else Path(str(s.source)).stem)
            for s in sample.document.segments]  # fmt: skip


@pytest.mark.parametrize("system", ["system", None])
@pytest.mark.parametrize(
    ("images", "question", "asked"),
    [
        ("a.png", "<image>\nWho?", ["a", "Who?"]),
        ("a.png", "Who? <image>", ["a", "Who?"]),
        (["a.png"], "Who?", ["a", "Who?"]),
        (["a.png", "b.png"], "<image>\nis before, <image> after. Who?", ["a", "is before,", "b", "after. Who?"]),
        (["a.png", "b.png"], "Who?", ["a", "b", "Who?"]),
    ],
)
def test_system_turns_and_several_images(system, images, question, asked, llava) -> None:
    turns = [{"from": "human", "value": question}, RECORD["conversations"][1]]
    first_turn = [{"from": "system", "value": "Be brief."}] if system else []
    record = RECORD | {"image": images, "conversations": first_turn + turns}
    (whole,) = llava("llava_conversations", record)
    said = [("system", "Be brief.")] if system else []
    assert shown(whole) == [*said, *(("user", part) for part in asked), ("assistant", "?")]
    assert [a.text for a in whole.answer] == ["A fox."]
    (single,) = llava("llava_instruct", record)
    names = [Path(str(image.source)).stem for image in single.document.images]
    assert names == [part for part in asked if len(part) == 1]
    assert "<image>" not in single.meta["question"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": ["a.png", "b.png", "c.png"]}, "3 images, but 1 places for them"),
        ({"image": ["a.png", 3]}, "must be a string"),
        ({"image": []}, "no reference"),
        ({"image": "a.png", "conversations": RECORD["conversations"][:1]}, "the last question has no answer"),
        ({"image": "a.png", "conversations": [{"from": "system", "value": "Be brief."}]}, "has no answer"),
    ],
)
def test_conversations_that_cannot_be_used_are_named(change, words, llava) -> None:
    with pytest.raises(InputError, match=words):
        llava("llava_conversations", RECORD | change)


def test_whole_conversations(toy_task: ToyTask, processor: MMInterleavedProcessor) -> None:
    task = toy_task("llava_conversations")
    for document in task.documents():
        processor(replace(document, segments=[Text("Be brief.", False, "system"), *document.segments]), training=True)
        assert {s.role for s in document.segments} == {"user", "assistant"}
        assert [s.supervise for s in document.segments] == [s.role == "assistant" for s in document.segments]
        processor(document, training=True)
