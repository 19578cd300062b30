"""Rows of whole documents (`packing: samples` and `single`), read through the loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm_interleaved.data import DataError, SourceConfig
from mm_interleaved.processor import MMInterleavedProcessor

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
