"""The phases for training of all tasks: every usable record is a document, whose choices are drawn anew."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mm_interleaved import MMInterleavedProcessor
from mm_interleaved.data import DataConfig, SourceConfig, build_loader
from mm_interleaved.data.augmentation import AugmentConfig, augment
from mm_interleaved.document import Document, Image, Text
from mm_interleaved.io import FileSlice, InputError
from mm_interleaved.io.images import open_image
from mm_interleaved.tasks import TASKS, Item, Task, TaskConfig, make_task

from .conftest import FILES, Written
from .official import GRIT_CAPTION

TRAINED = [name for name, kind in TASKS.items() if kind.train]
BOX = re.compile(r"\(\d{3},\d{3}\)\(\d{3},\d{3}\)")
Train = Callable[..., Task]


@pytest.fixture
def train(written: Written) -> Train:
    """A task's phase for training on small data."""

    def make(name: str, **options: str) -> Task:
        form, images = FILES[name]
        folder = written(form, "train")
        if name == "flickr30k":  # the toy world writes the test alone
            (folder / "train.token.coco_format").write_bytes((folder / "test1k.token.coco_format").read_bytes())
        paths = {"images": str(folder / images), "annotations": str(folder)}
        return make_task(TaskConfig(name, phase=TASKS[name].train, options=options, **paths))

    return make


def items(task: Task) -> list[Item]:
    found = list(task.items(training=True))
    assert not any(item.problem for item in found)
    return found


def drawn(task: Task, item: Item, seed: int) -> Document:
    return task.document(item, np.random.default_rng(seed))


def test_all_sets_that_have_one_have_a_phase_for_training() -> None:
    """NoCaps has no captions for training."""
    assert set(TASKS) - set(TRAINED) == {"nocaps"}


@pytest.mark.parametrize("name", TRAINED)
def test_every_record_is_a_document(name: str, train: Train, processor: MMInterleavedProcessor) -> None:
    """All slots are filled, only answers are learned, images are there, and boxes in texts are data too."""
    task = train(name)
    for item in items(task):
        for seed in range(2):
            document = drawn(task, item, seed)
            varied = item.vary(np.random.default_rng(seed)) if item.vary else item
            assert not any(s.is_open for s in document.segments)
            assert sum(s.supervise for s in document.segments) == len(varied.answer) >= 1
            for image in document.images:
                assert isinstance(image.source, PIL.Image.Image) or open_image(image.source).size  # type: ignore[arg-type]
            for text in [s for s in document.segments if isinstance(s, Text)]:
                assert [start for start, _ in text.boxes] == [found.start() for found in BOX.finditer(text.text or "")]
            assert (processor(document, training=True, max_length=4096).labels != -100).any()
            assert drawn(task, item, seed).segments == document.segments
    assert len(list(task.documents())) == len(list(task.samples())) >= 4


@pytest.mark.parametrize("name", TRAINED)
def test_items_for_training_hold_no_pixels(name: str, train: Train) -> None:
    """All items of a phase stay in memory."""
    for item in items(train(name)):
        values = [v for value in item.fields.values() for v in (value if isinstance(value, list) else [value])]
        for segment in (*values, *item.answer):
            assert not isinstance(segment, Image) or isinstance(segment.source, Path | FileSlice | None)


def answers(document: Document) -> list[Any]:
    return [s.text if isinstance(s, Text) else s.source for s in document.segments if s.supervise]


@pytest.mark.parametrize("name", ["flickr30k", "textcaps", "flickr30k_entities"])
def test_one_of_five_captions(name: str, train: Train) -> None:
    task = train(name)
    item = items(task)[0]
    seen = {str(answers(drawn(task, item, seed))) for seed in range(40)}
    assert len(seen) == 5
    assert answers(task.document(item)) == [item.answer[0].text]  # type: ignore[union-attr]


def test_one_of_five_captions_is_the_prompt_of_an_image(train: Train) -> None:
    task = train("coco")
    item = items(task)[0]
    seen = {str(drawn(task, item, seed).segments[0]) for seed in range(40)}
    assert len(seen) == 5
    assert str(task.document(item).segments[0]) in seen


@pytest.mark.parametrize("name", ["pororo", "flintstones"])
def test_other_frames_in_each_epoch(name: str, train: Train) -> None:
    task = train(name)
    found = items(task)
    epochs = []
    for epoch in range(4):
        documents = [drawn(task, item, epoch) for item in found]
        assert all([type(s) for s in d.segments] == [Text, Image] * 5 for d in documents)
        epochs.append([i.source.tobytes() for d in documents for i in d.images])  # type: ignore[union-attr]
    assert any(epoch != epochs[0] for epoch in epochs[1:])
    assert [s.supervise for s in documents[0].segments] == [False] * 3 + [True, False] * 3 + [True]


def test_a_clip_that_breaks_after_reading_is_named(written: Written, tmp_path: Path) -> None:
    folder = tmp_path / "pororo"
    shutil.copytree(written("pororo", "train"), folder)
    task = make_task(TaskConfig("pororo", phase="train", images=str(folder), annotations=str(folder)))
    clip = sorted(folder.rglob("*.png"))[0]
    clip.write_bytes(b"no image")
    with pytest.raises(InputError, match=clip.name):
        [drawn(task, item, 0) for item in items(task)]


def test_all_answers_of_a_dialogue(train: Train) -> None:
    task = train("visdial")
    item, sample = items(task)[0], next(task.samples())
    document = drawn(task, item, 0)
    assert len(answers(document)) == len(item.answer) == 10
    # With its own answers, the whole reads as the prompt of the last round with the history.
    text = "".join(
        ("" if s.attached or not i else " ") + (s.text or "") for i, s in enumerate(document.segments[1:])
        if isinstance(s, Text)
    ).replace("  ", " ")  # fmt: skip
    prompt = sample.document.segments[1]
    assert isinstance(prompt, Text)
    assert text == f"{prompt.text} {answers(document)[-1]}"
    assert sum(sample.reference["relevance"]) == 1.0


@pytest.mark.parametrize(("ask", "count"), [("referring", 2), ("grounding", 3), ("referring", 99)])
def test_several_regions_of_an_image(ask: str, count: int, train: Train) -> None:
    task = train("vg_regions", ask=ask, regions=str(count))
    item = items(task)[0]
    first, *others = [drawn(task, item, seed) for seed in range(8)]
    assert len(first.images) == 1
    assert len(answers(first)) == min(count, 6)
    assert len(set(answers(first))) == min(count, 6)
    assert any(answers(other) != answers(first) for other in others)
    texts = "".join(s.text or "" for s in first.segments if isinstance(s, Text))
    assert texts.count("<box>") == texts.count("</box>") == min(count, 6)
    boxes = [box for s in first.segments if isinstance(s, Text) for _, box in s.boxes]
    assert all(box.x2 - box.x1 == pytest.approx(0.2) and box.y2 - box.y1 == pytest.approx(0.5) for box in boxes)


def test_grit(train: Train) -> None:
    """Captions with boxes, and several expressions of an image; the unsure ones are left out."""
    task = train("grit")
    found = items(task)
    assert [Path(item.place.partition(",")[0]).name for item in found] == ["00000.tar"] * 2 + ["00001.tar"] * 2
    (text,) = answers(drawn(task, found[0], 0))
    assert text == ("<ref>a dog</ref><box>(249,499)(499,999)</box> in <ref>a field</ref><box>(000,499)(999,999)</box> "
                    "of flowers")  # fmt: skip
    task = train("grit", ask="grounding")
    assert answers(drawn(task, items(task)[0], 0)).count("(249,499)(499,999)</box>") == 1
    assert len(answers(drawn(task, items(task)[0], 0))) == 2
    task = train("grit", ask="referring", confidence="0.65")
    assert answers(drawn(task, items(task)[0], 0)) == [GRIT_CAPTION]
    assert len(items(train("grit", shards="00001.*"))) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shards": "9*.tar"}, "none matches '9*.tar'"),
        ({"regions": "0"}, "at least 1"),
        ({"confidence": "high"}, "must be a number"),
        ({"ask": "why"}, "cannot be 'why'"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, str], words: str, train: Train) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        list(train("grit", **options).items())


def test_odd_samples_of_a_shard_are_named(tmp_path: Path) -> None:
    def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))

    picture = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(picture, "JPEG")
    good = b'{"caption": "a dog", "noun_chunks": [[0, 5, 0, 0, 1, 1, 0.9]]}'
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, text in (("a", good), ("b", good.replace(b"5", b"50")), ("c", b'{"caption": "a dog"}'),
                           ("d", b"{"), ("e", good.replace(b"1, 1", b"1, 9"))):  # fmt: skip
            add(archive, f"{name}.jpg", picture.getvalue())
            add(archive, f"{name}.json", text)
        add(archive, "f.json", good)
    (tmp_path / "1.tar").write_bytes(b"no archive")
    folders = {"images": str(tmp_path), "annotations": str(tmp_path)}
    task = make_task(TaskConfig("grit", options={"shards": "0.tar"}, **folders))
    problems = [item.problem for item in task.items() if item.problem]
    assert len(problems) == 5
    words = (
        "of a caption of 5 characters",
        "'noun_chunks' is missing",
        "not JSON",
        "outside the image",
        "a .json belong",
    )
    for problem, word in zip(problems, words, strict=True):
        assert word in problem
    with pytest.raises(InputError, match=r"1\.tar"):
        list(make_task(TaskConfig("grit", **folders)).items())


def test_phrases_of_several_boxes(train: Train) -> None:
    """A caption lists them; a phrase has the one around them."""
    task = train("flickr30k_entities")
    (text,) = answers(task.document(items(task)[0]))
    assert text == (
        "<ref>Two red men</ref><box>(099,099)(499,499)</box><box>(399,399)(599,899)</box> see <ref>a kite</ref>"
        "<box>(000,019)(999,999)</box> in a park at night ."
    )
    task = train("flickr30k_phrases")
    assert len(items(task)) == 4 * 5 * 2
    assert [next(iter(task.samples())).reference] == [[99, 99, 599, 899]]


def test_conversations_without_images(train: Train) -> None:
    for name, kept in (("llava_665k", 1), ("llavar", 0)):
        for options, count in (({}, kept), ({"text_only": "keep"}, 1), ({"text_only": "drop"}, 0)):
            documents = list(train(name, **options).documents())
            assert len(documents) == 4 + count
            assert sum(not d.images for d in documents) == count


def boxes(document: Document) -> list[tuple[float, ...]]:
    return [box.sides for s in document.segments if isinstance(s, Text) for _, box in s.boxes]


@pytest.mark.parametrize("name", [name for name in TRAINED if TASKS[name].crop == "squash"])
def test_boxes_follow_a_flip(name: str, train: Train) -> None:
    task = train(name)
    for item in items(task):
        document = drawn(task, item, 0)
        flipped = augment(document, AugmentConfig(flip=1.0), np.random.default_rng(0), "squash")
        assert boxes(document)
        mirrored = [(1 - x2, y1, 1 - x1, y2) for x1, y1, x2, y2 in boxes(document)]
        assert boxes(flipped) == [pytest.approx(sides) for sides in mirrored]
        assert all(i.transform is not None and i.transform.flip for i in flipped.images)


@pytest.mark.parametrize("name", TRAINED)
def test_a_source_leaves_nothing_out(name: str, train: Train, processor: MMInterleavedProcessor) -> None:
    config = train(name).config
    options = {"task": name, "images": config.images, "annotations": config.annotations}
    source = SourceConfig("task", options=options, packing="single", max_length=4096, batch_size=1)
    loader = build_loader(DataConfig(sources=[source], sampling="sum", pin_memory=False), processor)
    rows = sum(1 for _ in loader)
    assert loader.report().rejected("task") == {}
    assert rows == loader.report().counts("task")["documents"] == len(items(train(name)))
