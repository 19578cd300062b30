"""Every type of source and its rules (docs/data_formats.md, "Training sources"), read through the loader."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm_interleaved.data import DataError, SourceConfig
from mm_interleaved.data.readers import make_reader
from mm_interleaved.data.shards import NumberedRecords, expand
from mm_interleaved.data.sources import SOURCES, SourceType
from mm_interleaved.document import Document, Image, Text
from mm_interleaved.processor import IMAGE_TOKEN, SOI_TOKEN, MMInterleavedProcessor
from mm_interleaved.processor.tokenizer import encode_text

from . import world
from .world import (
    loader,
    mmc4,
    numbers,
    pairs_source,
    png,
    texts,
    write_images,
    write_lines,
    write_members,
    write_pairs,
    write_tar,
)


def read(processor: MMInterleavedProcessor, type: str, folder: Path, shards: list[str], **options: Any) -> Any:
    """All rows of a source as text, their images' numbers, and the report."""
    defaults = {"root": str(folder), "batch_size": 1, "shuffle": 0, "keep_remainder": True, "cut": "document"}
    source = SourceConfig(type, shards=shards, **{**defaults, **options})
    made = loader(processor, source)
    batches = list(made)
    return [row for batch in batches for row in texts(processor, batch)], numbers(batches), made.report()


# ---- MMC4


SENTENCES = ["A first one.", "A second.", "The third."]


def write_mmc4(folder: Path, records: list[dict[str, Any]], name: str = "docs_0.jsonl") -> str:
    write_images(folder, 12)
    write_lines(folder / name, records)
    return name


def test_mmc4_images_stand_before_their_sentences(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_mmc4(tmp_path, [mmc4(SENTENCES, [("2.png", 2, 0.3), ("0.png", 0, 0.3)])])
    rows, images, _ = read(processor, "mmc4", tmp_path, ["docs_0.jsonl"], image_first_prob=1.0)
    assert rows == ["<s>[]A first one. A second.[]The third.</s>"]
    assert images == [0, 2]


@pytest.mark.parametrize(
    "folder", ["{number}", "docs_no_face_shard_{number}_v2", "docs_no_face_shard_{number}_v2_images"]
)
def test_mmc4_images_lie_in_the_folders_of_their_shards(
    folder: str, tmp_path: Path, processor: MMInterleavedProcessor
) -> None:
    """As MMC4's own program downloads them; both shards have an image of one name, and the first has one elsewhere."""
    shards = [f"docs_no_face_shard_{number}_v2.jsonl" for number in (3, 11)]
    write_images(tmp_path / "drawn", 4)
    for index, (number, shard) in enumerate(zip((3, 11), shards, strict=True)):
        with zipfile.ZipFile(tmp_path / f"{shard}.zip", "w") as archive:
            found = [("a.png", 0, 0.3), ("b.png", 1, 0.3), ("gone.png", 1, 0.3), ("../drawn/3.png", 1, 0.3)]
            archive.writestr(shard, json.dumps(mmc4(SENTENCES, found)) + "\n")
        inside = tmp_path / "images" / folder.format(number=number)
        inside.mkdir(parents=True)
        (tmp_path / f"drawn/{index}.png").rename(inside / "a.png")
    (tmp_path / "drawn/2.png").rename(tmp_path / "images/b.png")
    options = {"image_root": str(tmp_path / "images"), "shuffle_shards": False}
    _, images, report = read(processor, "mmc4", tmp_path, shards, **options)
    assert images == [0, 2, 1, 2]
    assert report.rejected("mmc4") == {"image missing": 2, "image outside its folder": 2}


def test_mmc4_images_stand_after_their_sentences(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_mmc4(tmp_path, [mmc4(SENTENCES, [("2.png", 2, 0.3), ("0.png", 0, 0.3)])])
    rows, images, _ = read(processor, "mmc4", tmp_path, ["docs_0.jsonl"], image_first_prob=0.0)
    assert rows == ["<s>A first one.[]A second. The third.[]</s>"]
    assert images == [0, 2]


def test_mmc4_is_tokenized_as_one_string(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    """Sentences are joined by one space each; spaces next to images are removed, others kept."""
    sentences = ["One. ", "  Two", "", "Three", " "]
    write_mmc4(tmp_path, [mmc4(sentences, [("1.png", 1, 0.3), ("3.png", 3, 0.3)])])
    source = SourceConfig("mmc4", root=str(tmp_path), shards=["docs_0.jsonl"], image_first_prob=1.0, batch_size=1,
                          keep_remainder=True)  # fmt: skip
    (batch,) = loader(processor, source)
    image = SOI_TOKEN + IMAGE_TOKEN * processor.num_image_tokens
    joined = " ".join(sentences[:1]) + " " + image + " ".join(sentences[1:3]) + " " + image + " ".join(sentences[3:])
    assert batch.input_ids[0].tolist() == encode_text(processor.tokenizer, f"<s>{joined}</s>")


def test_mmc4_drops_images_that_match_badly(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    record = mmc4(SENTENCES, [("0.png", 0, 0.239), ("1.png", 1, 0.24), ("2.png", 2, float("nan")), ("3.png", 2, 0.9)])
    del record["image_info"][3]["matched_sim"]
    write_mmc4(tmp_path, [record])
    _, images, report = read(processor, "mmc4", tmp_path, ["docs_0.jsonl"], single_image_prob=0.0)
    assert images == [1]
    assert report.rejected("mmc4") == {"similarity too low": 2, "'matched_sim' missing": 1}
    assert "docs_0.jsonl, line 1: 0.png" in report.examples("mmc4")["similarity too low"]
    _, images, _ = read(processor, "mmc4", tmp_path, ["docs_0.jsonl"], sim_threshold=0.1)
    assert images == [0, 1]


def test_mmc4_keeps_six_images_at_random_in_order(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    sentences = [f"s{i}" for i in range(10)]
    record = mmc4(sentences, [(f"{i}.png", i, 0.5) for i in range(10)])
    write_mmc4(tmp_path, [record] * 40)
    _, images, _ = read(processor, "mmc4", tmp_path, ["docs_0.jsonl"], max_length=500)
    documents = [images[i : i + 6] for i in range(0, 240, 6)]
    assert all(d == sorted(set(d)) for d in documents)
    assert set(images) == set(range(10))
    assert len({tuple(d) for d in documents}) > 20
    _, images, _ = read(processor, "mmc4", tmp_path, ["docs_0.jsonl"], max_images=2)
    assert len(images) == 80


def test_mmc4_extra_images_without_similarities_are_not_used(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    record = mmc4(SENTENCES, [("0.png", 0, 0.5), ("1.png", 1, 0.5), ("2.png", 2, 0.5)])
    record["similarity_matrix"] = [[], []]
    write_mmc4(tmp_path, [record])
    assert read(processor, "mmc4", tmp_path, ["docs_0.jsonl"])[1] == [0, 1]


def test_mmc4_rejects_half_of_the_single_images(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_mmc4(tmp_path, [mmc4(SENTENCES, [("1.png", 1, 0.5)])] * 200)
    _, images, report = read(processor, "mmc4", tmp_path, ["docs_0.jsonl"])
    assert 70 < len(images) < 130
    assert report.rejected("mmc4") == {"only one image": 200 - len(images)}
    assert len(read(processor, "mmc4", tmp_path, ["docs_0.jsonl"], single_image_prob=0.0)[1]) == 200
    _, images, report = read(processor, "mmc4", tmp_path, ["docs_0.jsonl"], single_image_prob=0.0, min_images=1)
    assert len(images) == 200


def test_mmc4_too_few_images(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    two, one = ([(f"{i}.png", i, 0.5) for i in range(n)] for n in (2, 1))
    write_mmc4(tmp_path, [mmc4(SENTENCES, two), mmc4(SENTENCES, one), mmc4(SENTENCES, [])])
    _, images, report = read(processor, "mmc4", tmp_path, ["docs_0.jsonl"], min_images=2)
    assert images == [0, 1]
    assert report.rejected("mmc4") == {"too few images": 1, "no image left": 1}


class Drawn:
    """Stands for a generator: leaves the order alone, and decides as told which images stand first."""

    def __init__(self, first: list[bool]) -> None:
        self.first = first

    def permutation(self, count: int) -> np.ndarray:
        return np.arange(count)

    def random(self, count: int) -> np.ndarray:
        return np.where(self.first[:count], 0.0, 0.9)


@pytest.mark.parametrize(
    ("first", "fixed", "compat"),
    [
        ([True, True], "78S", "78S"),
        ([False, False], "S78", "S78"),
        ([True, False], "7S8", "7S8"),
        ([False, True], "8S7", "7S8"),
    ],
)
def test_mmc4_two_images_on_one_sentence(tmp_path: Path, first: list[bool], fixed: str, compat: str) -> None:
    """Each stands on the side drawn for it, in the order of the list; the original ignores the side."""
    write_mmc4(tmp_path, [mmc4(["S"], [("7.png", 0, 0.5), ("8.png", 0, 0.5)])])
    for behaviour, expected in (([], fixed), (["listed_image_order"], compat)):
        config = SourceConfig("mmc4", root=str(tmp_path), shards=["docs_0.jsonl"], compat=behaviour)
        reader = make_reader(config, tmp_path)
        (record,) = reader.shards.records(0)
        document = reader.document(record, Drawn(first), print)
        assert "".join(s.text if isinstance(s, Text) else s.source.stem for s in document.segments) == expected


@pytest.mark.parametrize("suffix", ["", ".zip", ".gz"])
def test_mmc4_shards_are_found_packed_and_unpacked(
    tmp_path: Path, processor: MMInterleavedProcessor, suffix: str
) -> None:
    write_images(tmp_path / "images", 12)
    for shard in range(2):
        record = mmc4(SENTENCES, [(f"{2 * shard + i}.png", i, 0.5) for i in range(2)])
        write_lines(tmp_path / f"docs_shard_{shard}_v2.jsonl{suffix}", [record])
    _, images, report = read(
        processor, "mmc4", tmp_path, ["docs_shard_{0..1}_v2.jsonl"], image_root=str(tmp_path / "images"),
        shuffle_shards=False,
    )  # fmt: skip
    assert images == [0, 1, 2, 3]
    assert report.counts("mmc4") == {"shards": 2, "records": 2, "documents": 2, "images": 4, "rows": 1,
                                     "tokens": report.counts("mmc4")["tokens"]}  # fmt: skip


def test_a_zip_may_hold_one_file_of_any_name(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_images(tmp_path, 2)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("other.jsonl", json.dumps(mmc4(SENTENCES, [("0.png", 0, 0.5), ("1.png", 1, 0.5)])))
    assert read(processor, "mmc4", tmp_path, ["a.zip"])[1] == [0, 1]


# ---- pairs


def test_pairs_are_lower_cased_and_joined(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_images(tmp_path, 2)
    write_lines(
        tmp_path / "a.txt",
        [{"image": "0.png", "caption": "A Small CAT"}, {"image": "1.png", "caption": ["Two", "dogs"]}],
    )
    rows, images, _ = read(processor, "pairs", tmp_path, ["a.txt"], image_first_prob=1.0)
    assert rows == ["<s>[]a small cat</s><s>[]two dogs</s>"]
    assert images == [0, 1]
    rows, _, _ = read(processor, "pairs", tmp_path, ["a.txt"], image_first_prob=0.0, lowercase=False)
    assert rows == ["<s>A Small CAT[]</s><s>Two dogs[]</s>"]


def test_half_of_the_pairs_begin_with_the_image(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    rows, _, _ = read(processor, "pairs", tmp_path, write_pairs(tmp_path, 200))
    assert 70 < "".join(rows).count("<s>[]") < 130


def test_python_literals_are_read_with_one_warning(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    """The original's own example file has them."""
    write_images(tmp_path, 5)
    write_lines(tmp_path / "a.txt", [{"image": "0.png", "caption": "json"}, *[f"{{'image': '{i}.png', 'caption': \"it's {i}\"}}" for i in range(1, 5)]])  # fmt: skip  # noqa: E501
    with pytest.warns(UserWarning, match="'pairs' has Python literals instead of JSON .*line 2") as caught:
        _, images, report = read(processor, "pairs", tmp_path, ["a.txt"])
    assert len([w for w in caught if "literal" in str(w.message)]) == 1
    assert images == [0, 1, 2, 3, 4]
    assert report.rejected("pairs")["Python literal instead of JSON"] == 4
    _, images, report = read(processor, "pairs", tmp_path, ["a.txt"], compat=["strict_json"])
    assert images == [0]
    assert report.rejected("pairs") == {"line not JSON": 4}


def test_literals_do_not_run(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_images(tmp_path, 1)
    lines = ["__import__('os').mkdir('pwned')", "(" * 500, "1" * 5000, "{'a': open('x')}", "7"]
    write_lines(tmp_path / "a.txt", [{"image": "0.png", "caption": "a"}, *lines])
    _, images, report = read(processor, "pairs", tmp_path, ["a.txt"])
    assert images == [0]
    assert report.rejected("pairs") == {"line neither JSON nor a Python literal": 4, "line not an object": 1}


def test_long_pairs_lose_words_but_not_their_image(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    names = write_pairs(tmp_path, 1, words=20)
    tail = processor.num_image_tokens + 2
    whole = encode_text(processor.tokenizer, "item 0 " * 19 + "item 0")
    soi, token, eos = processor.soi_token_id, processor.image_token_id, processor.tokenizer.eos_token_id
    image = [soi, *[token] * processor.num_image_tokens]
    for first, ids in ((1.0, [1, *image, *whole][:30]), (0.0, [1, *whole[: 29 - tail], *image, eos])):
        source = pairs_source(tmp_path, names, max_length=30, image_first_prob=first)
        (batch,) = loader(processor, source)
        assert batch.input_ids[0].tolist() == ids


def test_short_captions_can_be_rejected(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_images(tmp_path, 2)
    write_lines(
        tmp_path / "a.txt", [{"image": "0.png", "caption": "short"}, {"image": "1.png", "caption": "long enough"}]
    )
    _, images, report = read(processor, "pairs", tmp_path, ["a.txt"], min_caption_length=10)
    assert images == [1]
    assert report.rejected("pairs") == {"caption too short": 1}


def test_few_shot_merging_joins_pairs(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    names = write_pairs(tmp_path, 24)
    options = {"image_first_prob": 1.0, "max_length": 100, "few_shot_merge_prob": 1.0, "few_shot_merge_sizes": [3]}
    plain, images, _ = read(processor, "pairs", tmp_path, names, **{**options, "few_shot_merge_prob": 0.0})
    merged, same_images, _ = read(processor, "pairs", tmp_path, names, **options)
    assert same_images == images
    for before, after in zip(plain, merged, strict=True):
        pairs = before.split("</s><s>")
        assert after == "</s><s>".join("".join(pairs[i : i + 3]) for i in range(0, len(pairs), 3))
    assert read(processor, "pairs", tmp_path, names, compat=["merge_without_effect"], **options)[0] == plain


def test_merged_pairs_know_where_their_context_begins(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    source = pairs_source(tmp_path, write_pairs(tmp_path, 8), max_length=100, few_shot_merge_prob=1.0)
    for batch in loader(processor, source):
        places = (batch.input_ids == processor.soi_token_id).nonzero()[:, 1]
        for row, start, soi in zip(batch.image_rows, batch.document_starts, places, strict=True):
            before = (batch.input_ids[row, :soi] == 1).nonzero()
            assert start == (before[-1] if len(before) else 0)


# ---- tar shards


def test_webdataset_samples(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_tar(tmp_path / "0.tar", {
        "a/0.txt": b"First Words\n", "a/0.png": png(0), "a/1.PNG": png(1), "a/1.json": b'{"caption": "second"}',
        "a/1.cls": b"3", "b/2.jpg": png(2), "b/2.seg.png": png(9), "b/2.txt": b"third",
    })  # fmt: skip
    rows, images, report = read(processor, "webdataset", tmp_path, ["*.tar"], image_first_prob=1.0)
    assert rows == ["<s>[]first words</s><s>[]second</s><s>[]third</s>"]
    assert images == [0, 1, 2]
    assert report.rejected("webdataset") == {}


def test_files_of_one_name_spoil_their_sample_only(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    """As in webdataset. The red caption must not stand with the blue image."""
    files = [("0.png", png(0)), ("0.txt", b"red"), ("0.png", png(1)), ("1.png", png(2)), ("1.txt", b"green"),
             ("2.png", png(3)), ("2.txt", b"x"), ("2.png", png(4)), ("2.txt", b"y"), ("2.PNG", png(5)),
             ("3.png", png(6)), ("3.txt", b"white")]  # fmt: skip
    write_members(tmp_path / "0.tar", files)
    rows, images, report = read(processor, "webdataset", tmp_path, ["0.tar"], image_first_prob=1.0)
    assert rows == ["<s>[]green</s><s>[]white</s>"]
    assert images == [2, 6]
    assert report.rejected("webdataset") == {"sample with two files of one name": 2}
    assert "0.tar, sample 0: 0.png" in report.examples("webdataset")["sample with two files of one name"]


@pytest.mark.parametrize("prefix", ["", "./", "some.folder/"])
def test_files_that_belong_to_no_sample_part_none(
    tmp_path: Path, processor: MMInterleavedProcessor, prefix: str
) -> None:
    """A Mac adds `._` files; webdataset leaves out what has no extension, and `__meta__` files."""
    files = [("._0.png", b"x"), ("0.png", png(0)), ("._0.txt", b"x"), ("README", b"x"), ("0.txt", b"red"),
             ("__MACOSX__/0.txt", b"x"), (".DS_Store", b"x"), ("1.png", png(1)), ("._1.txt", b"x"), ("1.txt", b"blue"),
             ("._end", b"x")]  # fmt: skip
    write_members(tmp_path / "0.tar", [(prefix + name, content) for name, content in files])
    rows, images, report = read(processor, "webdataset", tmp_path, ["0.tar"], image_first_prob=1.0)
    assert rows == ["<s>[]red</s><s>[]blue</s>"]
    assert images == [0, 1]
    assert report.rejected("webdataset") == {"file that belongs to no sample": 7}


def test_webdataset_samples_that_lack_something(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_tar(tmp_path / "0.tar", {
        "0.txt": b"no image", "1.png": png(1), "2.png": b"", "2.txt": b"x", "3.png": b"junk", "3.txt": b"x",
        "4.png": png(4), "4.txt": b"\xff\xfe", "5.png": png(5), "5.json": b"{", "6.png": png(6), "6.txt": b"good",
    })  # fmt: skip
    _, images, report = read(processor, "webdataset", tmp_path, ["0.tar"])
    assert images == [6]
    assert report.rejected("webdataset") == {
        "sample without an image": 1, "'caption' missing": 1, "image empty": 1, "image unreadable": 1,
        "caption not UTF-8": 1, "line not JSON": 1,
    }  # fmt: skip
    assert "0.tar, sample 0" in report.examples("webdataset")["sample without an image"]


# ---- documents


def test_documents_of_every_form(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_images(tmp_path / "p", 12)
    write_lines(tmp_path / "a.jsonl", [
        {"segments": [{"text": "One"}, {"image": "p/1.png"}, {"text": "and more"}]},
        {"sentences": ["Two", "end"], "images": ["p/2.png"], "sentence_ixs": [1], "image_first": [True]},
        {"texts": ["Three", None, "end"], "images": [None, "p/3.png", None], "metadata": "[]"},
        {"texts": [None, "Four", None], "images": ["p/4.png", None, "p/5.png"]},
    ])  # fmt: skip
    rows, images, report = read(processor, "documents", tmp_path, ["a.jsonl"])
    assert rows == [
        "<s>One[]and more</s><s>Two[]end</s><s>Three[]end</s><s>[]Four[]</s>",
    ]
    assert images == [1, 2, 3, 4, 5]
    assert report.rejected("documents") == {}


def test_conversations_learn_only_the_answers(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_images(tmp_path, 1)
    user = {"role": "user", "content": [{"type": "image", "path": "0.png"}, {"type": "text", "text": "Who?"}]}
    write_lines(tmp_path / "a.jsonl", [{"messages": [user, {"role": "assistant", "content": "Mila"}]}])
    source = SourceConfig("documents", root=str(tmp_path), shards=["a.jsonl"], batch_size=1, keep_remainder=True)
    (batch,) = loader(processor, source)
    learned = batch.input_ids[batch.labels != -100]
    assert processor.decode_text(learned.tolist()) == "Mila"
    assert batch.image_loss_mask.tolist() == [0.0]


def test_targets_are_what_is_drawn(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_images(tmp_path, 12)
    write_lines(
        tmp_path / "a.jsonl",
        [{"segments": [{"image": "3.png", "target": "9.png"}, {"image": "4.png", "supervise": False}]}],
    )
    source = SourceConfig("documents", root=str(tmp_path), shards=["a.jsonl"], batch_size=1, keep_remainder=True)
    (batch,) = loader(processor, source)
    assert numbers([batch]) == [3, 4]
    assert [world.number_of(p) for p in batch.target_pixel_values.numpy()] == [9, 4]
    assert batch.image_loss_mask.tolist() == [1.0, 0.0]


def test_documents_that_cannot_be_used(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_images(tmp_path, 3)
    write_lines(tmp_path / "a.jsonl", [
        {"segments": [{"text": "x"}, {"image": "gone.png"}]},
        {"segments": [{"text": "x"}, {"image": "missing.png"}]},
        {"segments": [{"text": "x"}]},
        {"segments": [{"text": f"a {IMAGE_TOKEN} b"}, {"image": "0.png"}]},
        {"texts": ["a"], "images": ["1.png", None]},
        {"texts": [None, None, 3, "ok"], "images": ["gone.png", "https://x.org/a.png", None, "2.png"]},
        {"segments": [{"image": "0.png"}, {"image": None}]},
    ])  # fmt: skip
    rows, images, report = read(processor, "documents", tmp_path, ["a.jsonl"])
    assert images == [0, 2]
    (row,) = rows
    assert row.startswith("<s>a <")  # the token's name is written out, as the text that it is
    assert row.endswith("[]</s><s>[]ok</s>")
    assert report.rejected("documents") == {
        "the file '…' does not exist": 2, "too few images": 1, "document cannot be encoded": 1,
        "'texts' and 'images' must be lists of one length": 1, "image missing": 1, "image is a URL": 1,
        "text malformed": 1,
    }  # fmt: skip


def test_documents_are_thinned_out(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_images(tmp_path, 8)
    write_lines(tmp_path / "a.jsonl", [{"segments": [{"image": f"{i}.png"} for i in range(8)]}] * 20)
    _, images, _ = read(processor, "documents", tmp_path, ["a.jsonl"], max_images=3)
    assert len(images) == 60
    assert Counter(images).keys() == set(range(8))


# ---- rows


def test_text_without_images(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_lines(tmp_path / "a.jsonl", [{"segments": [{"text": f"text {i}"}]} for i in range(9)])
    options = {"min_images": 0, "max_length": 20}
    rows, _, report = read(processor, "documents", tmp_path, ["a.jsonl"], keep_text_only=True, **options)
    assert "".join(rows).count("<s>") == 9
    assert report.counts("documents")["images"] == 0
    with pytest.raises(DataError, match=r"gave no batch in a whole pass: .* x row without an image"):
        read(processor, "documents", tmp_path, ["a.jsonl"], **options)


def test_remainders_are_dropped_and_counted(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    names = write_pairs(tmp_path, 30)
    options = {"max_length": 50, "cut": "image"}
    whole, _, _ = read(processor, "pairs", tmp_path, names, **options)
    rows, _, report = read(processor, "pairs", tmp_path, names, keep_remainder=False, **options)
    assert rows == whole[:-1]
    assert report.rejected("pairs") == {"remainder shorter than a row": 1}
    rows, _, report = read(processor, "pairs", tmp_path, names, keep_remainder=False, batch_size=4, **options)
    assert rows == whole[:4]
    assert report.rejected("pairs") == {"remainder shorter than a row": 1, "row of an incomplete batch": len(whole) - 5}


def test_rows_hold_at_most_so_many_images(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    source = pairs_source(tmp_path, write_pairs(tmp_path, 30), max_length=200, max_images_per_sequence=4)
    counts = [len(batch.image_rows) for batch in loader(processor, source)]
    assert sum(counts) == 30
    assert max(counts) == 4


def test_batches_are_padded_to_the_longest_row_or_to_the_full_length(
    tmp_path: Path, processor: MMInterleavedProcessor
) -> None:
    source = pairs_source(tmp_path, write_pairs(tmp_path, 20), max_length=40, batch_size=3)
    for batch in loader(processor, source):
        assert batch.attention_mask.sum(1).max() == batch.input_ids.shape[1] <= 40
        assert (batch.labels[batch.attention_mask == 0] == -100).all()
    assert {b.input_ids.shape[1] for b in loader(processor, source, pad_to_max_length=True)} == {40}


def test_what_is_learned_of_pairs(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    """Conformance 6: what is learned of captions before and after their image."""
    names = write_pairs(tmp_path, 1)
    soi, eos = processor.soi_token_id, processor.tokenizer.eos_token_id
    caption = encode_text(processor.tokenizer, "item 0")
    cases = [(0.0, True, [soi, eos]), (0.0, False, [*caption, soi, eos])]
    cases += [(1.0, ignore, [*caption, eos]) for ignore in (True, False)]
    for first, ignore, expected in cases:
        source = pairs_source(tmp_path, names, image_first_prob=first, ignore_text_before_image=ignore)
        (batch,) = loader(processor, source)
        assert batch.labels[batch.labels != -100].tolist() == expected


def test_batches_carry_name_and_weights(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    source = pairs_source(tmp_path, write_pairs(tmp_path, 2), name="blip2", loss_image_weight=2.5)
    batch = next(iter(loader(processor, source)))
    assert (batch.source, batch["loss_image_weight"], "loss_text_weight" in batch) == ("blip2", 2.5, False)
    assert "source" not in batch
    moved = batch.to("cpu")
    assert (moved.source, moved.loss_image_weight) == ("blip2", 2.5)


def test_both_views_show_the_same_image(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    source = pairs_source(tmp_path, write_pairs(tmp_path, 9))
    for batch in loader(processor, source):
        assert numbers([batch]) == [world.number_of(p) for p in batch.target_pixel_values.numpy()]
        assert batch.pixel_values.dtype == batch.target_pixel_values.dtype == torch.uint8


def test_documents_are_tokenized_as_by_the_processor(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_images(tmp_path, 1)
    document = Document([Text("A cat."), Image(str(tmp_path / "0.png")), Text("It"), Text("sleeps.", attached=True)])
    segments = [{"text": "A cat."}, {"image": "0.png"}, {"text": "It"}, {"text": "sleeps.", "attached": True}]
    write_lines(tmp_path / "a.jsonl.gz", [{"segments": segments}])
    source = SourceConfig("documents", root=str(tmp_path), shards=["a.jsonl"], batch_size=1, keep_remainder=True)
    (batch,) = loader(processor, source)
    expected = processor(document, training=True)
    for key in expected:
        found = batch[key] / 255 if batch[key].dtype == torch.uint8 else batch[key]
        assert np.array_equal(found, expected[key]), key


# ---- names of shards


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("docs_shard_{0..2}_v2.jsonl", ["docs_shard_0_v2.jsonl", "docs_shard_1_v2.jsonl", "docs_shard_2_v2.jsonl"]),
        ("{0098..0101}.txt", ["0098.txt", "0099.txt", "0100.txt", "0101.txt"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("plain.jsonl", ["plain.jsonl"]),
        ("{x}.jsonl", ["{x}.jsonl"]),
    ],
)
def test_brace_patterns(pattern: str, names: list[str]) -> None:
    assert expand(pattern, Path("/nowhere")) == names


def test_wild_cards(tmp_path: Path) -> None:
    for name in ("b.gz", "a.gz", "c.txt"):
        (tmp_path / name).write_bytes(gzip.compress(b""))
    assert expand("*.gz", tmp_path) == ["a.gz", "b.gz"]
    with pytest.raises(DataError, match=r"no file in .* matches '\*.tar'"):
        expand("*.tar", tmp_path)


class Silent:
    """A plug-in's reader that forgets to return its documents."""

    def __init__(self, config: SourceConfig, options: None, folder: Path) -> None:
        self.shards = NumberedRecords("silent", 3)

    def document(self, *_: object) -> None: ...


def test_a_reader_without_a_document_is_named_with_the_record(
    processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(SOURCES._values, "silent", SourceType(Silent, has_files=False))
    with pytest.raises(DataError, match=r"source 'mine', silent.*the source type 'silent' gave a NoneType in place of"):
        list(loader(processor, SourceConfig("silent", name="mine", batch_size=1, root=str(tmp_path))))
