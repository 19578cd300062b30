"""Folders of images with texts: both directions, metadata of every form, resuming, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from mm_interleaved.data import DataError, SourceConfig
from mm_interleaved.processor import Batch, MMInterleavedProcessor

from .test_messages import learned
from .test_resume import same, through_file
from .world import loader, numbers, texts, write_images, write_lines

COUNT = 12


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images `0.png` to `11.png`, each with a text and a style."""
    write_images(tmp_path, COUNT)
    write_lines(tmp_path / "metadata.jsonl", [row(n) for n in range(COUNT)])
    return tmp_path


def row(number: int) -> dict[str, Any]:
    return {"file_name": f"{number}.png", "text": f"Item {number}.", "style": "ink", "year": 1990 + number}


def source(root: Path, **options: Any) -> SourceConfig:
    known = {key: options.pop(key) for key in list(options) if key in SourceConfig.__dataclass_fields__}
    plain: dict[str, Any] = {"batch_size": 1, "max_length": 400, "keep_remainder": True, "shuffle": 0}
    return SourceConfig("imagefolder", root=str(root), options=options, **{**plain, "shuffle_shards": False, **known})


def read(processor: MMInterleavedProcessor, root: Path, **options: Any) -> tuple[list[str], list[str], list[int]]:
    """The documents of an epoch, what is learned of them, and their images."""
    batches = list(loader(processor, source(root, **options), sampling="sum"))
    return documents(processor, batches), [x for batch in batches for x in learned(processor, batch)], numbers(batches)


def documents(processor: MMInterleavedProcessor, batches: Iterable[Batch]) -> list[str]:
    rows = "".join(text for batch in batches for text in texts(processor, batch)).replace("[] ", "[]")
    return [text.strip() for text in rows.split("<s>")[1:]]


def test_images_are_learned_from_their_texts(root: Path, processor: MMInterleavedProcessor) -> None:
    rows, answers, images = read(processor, root)
    assert rows == [f"Item {n}.[]</s>" for n in range(COUNT)]
    assert answers == ["[]", "</s>"] * COUNT
    assert images == list(range(COUNT))


def test_texts_are_learned_from_their_images(root: Path, processor: MMInterleavedProcessor) -> None:
    rows, answers, images = read(processor, root, learn="text", prompt="{image}In {style}, {year}:")
    assert rows == [f"[]In ink, {1990 + n}: Item {n}.</s>" for n in range(COUNT)]
    assert answers == [f"Item {n}.</s>" for n in range(COUNT)]
    assert images == list(range(COUNT))


def test_either_direction_and_one_of_several_prompts(root: Path, processor: MMInterleavedProcessor) -> None:
    prompts = ["{text}", "{text} In {style}."]
    made = loader(processor, source(root, learn="either", image_prompt=prompts), sampling="sum")
    epochs = [documents(processor, made) for _ in range(5)]
    for number in range(COUNT):
        forms = {f"[]Item {number}.</s>", f"Item {number}.[]</s>", f"Item {number}. In ink.[]</s>"}
        assert {epoch[number] for epoch in epochs} <= forms
    starts = [text.startswith("[]") for epoch in epochs for text in epoch]
    assert 0.25 < sum(starts) / len(starts) < 0.75


@pytest.mark.parametrize("form", ["csv", "txt", "caption", "column"])
def test_other_forms_of_metadata(form: str, root: Path, processor: MMInterleavedProcessor) -> None:
    (root / "metadata.jsonl").unlink()
    options = {}
    if form == "csv":
        lines = [f'{n}.png,"Item\n{n}, ""so"""' for n in range(COUNT)]
        (root / "metadata.csv").write_text("\n".join(["file_name,text", *lines]), newline="")
    elif form == "txt":
        (root / "sub").mkdir()
        for number in range(COUNT):
            (root / f"{number}.png").rename(root / "sub" / f"{number}.png")
            (root / "sub" / f"{number}.txt").write_text(f"Item {number}.\n")
    else:
        name, options = ("caption", {}) if form == "caption" else ("prompt", {"column": "prompt"})
        write_lines(root / "metadata.jsonl", [{"file_name": f"{n}.png", name: f"Item {n}."} for n in range(COUNT)])
    rows, _, images = read(processor, root, **options)
    assert sorted(images) == list(range(COUNT))
    wanted = "Item<0x0A>{0}, <0x22>so<0x22>" if form == "csv" else "Item {0}."
    assert [" ".join(text.split()) for text in rows] == [wanted.format(n) + "[]</s>" for n in images]


BAD: list[tuple[Any, str]] = [
    ({"file_name": "gone.png", "text": "x"}, "image missing"),
    ({"file_name": "../0.png", "text": "x"}, "image outside its folder"),
    ({"text": "x"}, "'file_name' missing"),
    ({"file_name": "0.png"}, "'text' missing"),
    ({"file_name": "0.png", "text": 3}, "'text' malformed"),
    ({"file_name": "0.png", "text": "  "}, "'text' blank"),
    ("not JSON", "line not JSON"),
    ([1], "line not an object"),
]


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_bad_records_are_counted(record: Any, reason: str, root: Path, processor: MMInterleavedProcessor) -> None:
    write_lines(root / "metadata.jsonl", [record, row(1)])
    made = loader(processor, source(root), sampling="sum")
    assert numbers(made) == [1]
    ((found, number),) = made.report().rejected("imagefolder").items()
    assert found.startswith(reason)
    assert number == 1
    assert "metadata.jsonl, line 1" in made.report().examples("imagefolder")[found]


def test_a_template_with_an_unknown_column_says_which_there_are(root: Path, processor: MMInterleavedProcessor) -> None:
    with pytest.raises(DataError, match=r"has a field \{artist\}; there is file_name, text, style, year"):
        read(processor, root, image_prompt="{text} by {artist}")


def test_a_folder_without_texts_is_refused(root: Path, processor: MMInterleavedProcessor) -> None:
    (root / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match=r"no metadata\.csv, and no image.*Write metadata\.jsonl with a line"):
        read(processor, root)
    (root / "train").mkdir()
    write_lines(root / "train" / "metadata.jsonl", [row(1)])
    with pytest.raises(DataError, match="Name one of its folders: train"):
        read(processor, root)
    (root / "metadata.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        read(processor, root)
    with pytest.raises(DataError, match="there is no folder"):
        read(processor, root / "nowhere")
    with pytest.raises(DataError, match="'prompt' is an empty list"):
        read(processor, root, prompt=[])


@pytest.mark.parametrize("shuffle", [0, 4, 100])
def test_going_on_equals_an_unbroken_run(shuffle: int, root: Path, processor: MMInterleavedProcessor) -> None:
    config = source(root, learn="either", shuffle=shuffle, max_length=30)
    for rank in range(2):

        def make(rank: int = rank) -> Any:
            return loader(processor, config, sampling="sum", rank=rank, world_size=2)

        expected = list(make())
        assert len(expected) > 2
        for stop in range(1, len(expected)):
            first, second = make(), make()
            list(itertools.islice(first, stop))
            second.load_state_dict(through_file(first.state_dict()))
            rest = list(second)
            assert len(rest) == len(expected) - stop
            assert all(same(a, b) for a, b in zip(rest, expected[stop:], strict=True))
    assert json.dumps(through_file(make().state_dict()))


def test_another_caption_is_other_data(root: Path, processor: MMInterleavedProcessor) -> None:
    write_lines(root / "metadata.jsonl", [row(n) for n in range(3)])
    first = loader(processor, source(root), sampling="sum")
    next(iter(first))
    write_lines(root / "metadata.jsonl", [row(0), row(1), row(2) | {"text": "Another."}])
    second = loader(processor, source(root), sampling="sum")
    second.load_state_dict(first.state_dict())
    with pytest.raises(DataError, match=r"other data: 'sources\.imagefolder\.digest' was"):
        next(iter(second))
