"""Rows of whole documents (`packing: samples` and `single`), read through the loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm_interleaved.data import DataError, SourceConfig
from mm_interleaved.data.sources import SOURCES
from mm_interleaved.processor import Batch, MMInterleavedProcessor

from .world import loader, numbers, png, texts, write_images, write_lines


def write_documents(folder: Path, sizes: list[int], images: bool = True) -> None:
    """Documents of an image and so many words, numbered, in their order."""
    names = write_images(folder, len(sizes))
    records = [
        {"segments": [{"image": names[i]}, {"text": "a" + " a" * (size - 1)}][0 if images else 1 :]}
        for i, size in enumerate(sizes)
    ]
    write_lines(folder / "a.jsonl", records)


def source(folder: Path, **options: Any) -> SourceConfig:
    defaults = {"root": str(folder), "shards": ["a.jsonl"], "shuffle": 0, "batch_size": 1, "packing": "samples"}
    return SourceConfig("documents", **{**defaults, **options})


def test_whole_samples_fill_rows_in_order(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    """A sample of n words has n + 7 tokens: `<s>`, an image of 5, the words, `</s>`."""
    write_documents(tmp_path, [2, 5, 1, 13, 1])
    made = loader(processor, source(tmp_path, max_length=21))
    batches = list(made)
    assert [int(b.attention_mask.sum()) for b in batches] == [9 + 12, 8, 20, 8]
    assert [b.get("sample_ids") is not None for b in batches] == [True, False, False, False]
    first = batches[0]
    assert first.sample_ids[0].tolist() == [0] * 9 + [1] * 12
    assert first.position_ids[0].tolist() == [*range(9), *range(12)]
    assert first.document_starts.tolist() == [0, 9]
    assert numbers(batches) == [0, 1, 2, 3, 4]
    assert all(row.startswith("<s>[]") and row.endswith("</s>") for b in batches for row in texts(processor, b))


def test_one_sample_a_row(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_documents(tmp_path, [2, 5, 1])
    batches = list(loader(processor, source(tmp_path, max_length=40, packing="single")))
    assert [int(b.attention_mask.sum()) for b in batches] == [9, 12, 8]
    assert not any("sample_ids" in b for b in batches)


def test_samples_may_share_attention(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_documents(tmp_path, [2, 5])
    (batch,) = loader(processor, source(tmp_path, max_length=40, attention="row"))
    assert "sample_ids" not in batch
    assert batch.position_ids[0].tolist() == [*range(21)]
    assert batch.document_starts.tolist() == [0, 9]  # MMFS and the image decoder keep documents apart anyway


def test_rows_of_a_stream_may_keep_documents_apart(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_documents(tmp_path, [6, 8])
    stream = source(tmp_path, max_length=18, packing="stream", attention="sample", keep_remainder=True)
    first, _ = loader(processor, stream, mix="row", batch_size=1)
    assert first.sample_ids[0].tolist() == [0] * 13 + [1] * int((first.attention_mask.sum()) - 13)


def test_sources_of_both_kinds_in_one_batch(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    for name in ("apart", "joined"):
        write_documents(tmp_path / name, [2, 5])
    sources = [
        source(tmp_path / "apart", name="apart", max_length=21),
        source(tmp_path / "joined", name="joined", max_length=21, attention="row"),
    ]
    (batch,) = loader(processor, *sources, mix="row", batch_size=2, sampling="sum", seed=1)
    assert sorted(ids.max().item() for ids in batch.sample_ids) == [0, 1]
    assert sorted(ids.max().item() for ids in batch.position_ids) == [11, 20]


def test_rows_hold_at_most_so_many_images(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_documents(tmp_path, [1, 1, 1, 1, 1])
    batches = list(loader(processor, source(tmp_path, max_length=500, max_images_per_sequence=2)))
    assert [len(b.pixel_values) for b in batches] == [2, 2, 1]


def test_rows_without_an_image_are_kept(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_documents(tmp_path, [1, 2], images=False)
    (batch,) = loader(processor, source(tmp_path, max_length=500, min_images=0))
    assert texts(processor, batch) == ["<s>a</s><s>a a</s>"]
    assert len(batch.pixel_values) == 0


def test_a_sample_that_is_too_long_is_counted(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_documents(tmp_path, [2, 30, 1])
    made = loader(processor, source(tmp_path, max_length=21))
    assert numbers(made) == [0, 2]
    assert made.report().rejected("documents") == {"document longer than a row": 1}
    assert (
        made.report()
        .examples("documents")["document longer than a row"]
        .endswith("a.jsonl, line 2: 37 tokens, but rows have 21")
    )


@pytest.mark.parametrize("packing", ["samples", "single"])
def test_a_sample_that_is_too_long_may_be_an_error(
    tmp_path: Path, processor: MMInterleavedProcessor, packing: str
) -> None:
    write_documents(tmp_path, [2, 30, 1])
    with pytest.raises(
        DataError, match=r"a.jsonl, line 2: the document has 37 tokens, but rows have 21.*too_long: drop"
    ):
        list(loader(processor, source(tmp_path, max_length=21, packing=packing, too_long="error")))


def test_a_damaged_image_takes_its_sample_only(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    """Its header can be read, so the row is full before the image is decoded."""
    write_documents(tmp_path, [2, 5, 1])
    (tmp_path / "1.png").write_bytes(png(1, (64, 64))[:100])
    made = loader(processor, source(tmp_path, max_length=100))
    (batch,) = made
    assert numbers([batch]) == [0, 2]
    assert texts(processor, batch) == ["<s>[]a a</s><s>[]a</s>"]
    assert batch.sample_ids[0].tolist() == [0] * 9 + [1] * 8
    found = made.report()
    assert found.rejected("documents") == {"image damaged": 1, "document with a damaged image": 1}
    assert found.counts("documents")["images"] == 2


def test_a_row_may_lose_all_its_samples(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_documents(tmp_path, [2, 5])
    (tmp_path / "0.png").write_bytes(png(1, (64, 64))[:100])
    batches = list(loader(processor, source(tmp_path, packing="single")))
    assert numbers(batches) == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut": "image"}, "'cut' of source 'documents' is for rows of 'packing: stream'"),
        ({"few_shot_merge_prob": 0.5}, "'few_shot_merge_prob' of source 'documents' is for rows of 'packing: stream'"),
        ({"packing": "stream", "too_long": "error"}, "'too_long: error' of source 'documents' has no effect"),
        ({"packing": "rows"}, "packing"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(tmp_path, **options)


@pytest.mark.parametrize(
    ("type", "packing", "attention"),
    [("pairs", "stream", "row"), ("mmc4", "stream", "row"), ("documents", "stream", "row"),
     ("messages", "samples", "sample"), ("imagefolder", "samples", "sample"), ("task", "samples", "sample")],
)  # fmt: skip
def test_what_types_do_by_themselves(type: str, packing: str, attention: str) -> None:
    found = SourceConfig(type, shards=["a.jsonl"] if SOURCES[type].has_files else [])
    assert (found.packing, found.attention) == (packing, attention)


# ---- batches of similar lengths


def places_of(batches: list[Batch]) -> int:
    """Tokens of the batches, with padding."""
    return sum(batch.input_ids.numel() for batch in batches)


@pytest.mark.parametrize("mix", ["batch", "row"])
def test_grouped_batches_have_the_same_rows_and_less_padding(
    tmp_path: Path, processor: MMInterleavedProcessor, mix: str
) -> None:
    sizes = [1, 30, 2, 29, 3, 28, 4, 27, 5, 26, 6, 25]
    write_documents(tmp_path, sizes)
    single = source(tmp_path, max_length=64, packing="single", batch_size=3)
    options = {"mix": mix, "batch_size": 3}
    plain = list(loader(processor, single, **options))
    grouped = list(loader(processor, single, group_by_length=True, **options))
    assert sorted(numbers(grouped)) == sorted(numbers(plain)) == [*range(12)]
    assert [len(b.input_ids) for b in grouped] == [3] * 4
    real = sum(size + 7 for size in sizes)
    assert places_of(plain) > 1.5 * real
    assert places_of(grouped) < 1.1 * real
    lengths = [b.input_ids.shape[1] for b in grouped]
    assert lengths != sorted(lengths)  # batches are in random order
    again = list(loader(processor, single, group_by_length=True, **options))
    assert numbers(again) == numbers(grouped)


def test_grouped_batches_keep_sources_apart(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    sources = []
    for name, sizes in (("short", [1, 2, 3, 4]), ("long", [2, 9, 3, 8])):
        write_documents(tmp_path / name, sizes)
        sources.append(source(tmp_path / name, name=name, max_length=64, packing="single", batch_size=2))
    made = loader(processor, *sources, sampling="sum", group_by_length=True)
    batches = list(made)
    assert sorted(str(b.source) for b in batches) == ["long", "long", "short", "short"]
    assert sorted(b.input_ids.shape[1] for b in batches if b.source == "long") == [10, 16]
    assert made.report().counts("long")["rows"] == 4


def test_a_state_without_groups_is_refused(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_documents(tmp_path, [1, 2, 3, 4])
    made = {grouped: loader(processor, source(tmp_path), group_by_length=grouped) for grouped in (False, True)}
    for grouped, other in ((False, True), (True, False)):
        next(iter(made[grouped]))
        again = loader(processor, source(tmp_path), group_by_length=other)
        again.load_state_dict(made[grouped].state_dict())
        with pytest.raises(DataError, match="group_by_length"):
            next(iter(again))


@pytest.mark.parametrize("other", ["pad_to_max_length", "fix_sampling_ratio"])
def test_groups_need_other_shapes(tmp_path: Path, processor: MMInterleavedProcessor, other: str) -> None:
    with pytest.raises(ValueError, match=f"leave it or '{other}' out"):
        loader(processor, source(tmp_path), group_by_length=True, **{other: True})
