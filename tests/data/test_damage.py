"""Bad input: nothing is fatal, nothing is silent. Each test says what happens."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mm_interleaved.data import DataError, DataReport, SourceConfig
from mm_interleaved.processor import MMInterleavedProcessor

from .world import loader, mmc4, numbers, pairs_source, png, write_images, write_lines, write_pairs, write_tar


def read(processor: MMInterleavedProcessor, source: SourceConfig, **options: Any) -> tuple[list[int], DataReport]:
    """The numbers of all images in order, and the report."""
    made = loader(processor, source, **options)
    return sorted(numbers(made)), made.report()


# ---- shards


def test_a_missing_shard_is_counted_and_the_rest_read(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_pairs(tmp_path, 9, shards=3)
    (tmp_path / "1.jsonl").unlink()
    found, report = read(processor, pairs_source(tmp_path, ["{0..3}.jsonl"]))
    assert found == [0, 2, 3, 5, 6, 8]
    assert report.rejected("pairs") == {"shard missing": 2}
    assert report.counts("pairs")["shards"] == 2
    assert str(tmp_path) in report.examples("pairs")["shard missing"]


@pytest.mark.parametrize("damage", ["no archive", "cut", "two files", "flipped bits", "password"])
def test_a_damaged_zip_is_counted(tmp_path: Path, processor: MMInterleavedProcessor, damage: str) -> None:
    write_pairs(tmp_path, 400, shards=2)
    path = tmp_path / "1.jsonl.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ["x", "y"] if damage == "two files" else ["1.jsonl"]:
            archive.writestr(name, (tmp_path / "1.jsonl").read_bytes())
    data = path.read_bytes()
    middle = len(data) // 3
    broken = {
        "no archive": b"hello",
        "cut": data[: len(data) // 2],
        "two files": data,
        "flipped bits": data[:middle] + b"\0" * 40 + data[middle + 40 :],
        # Flags in the local header and in the directory say that the file is encrypted.
        "password": (data[:6] + b"\1" + data[7:]).replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"),
    }
    path.write_bytes(broken[damage])
    (tmp_path / "1.jsonl").unlink()
    found, report = read(processor, pairs_source(tmp_path, ["0.jsonl", "1.jsonl"]))
    assert set(range(0, 400, 2)) <= set(found)
    assert len(found) < 400
    assert report.rejected("pairs")["shard damaged"] == 1
    assert report.examples("pairs")["shard damaged"].startswith("1.jsonl: ")


def test_of_a_cut_gzip_what_is_whole_is_read(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_pairs(tmp_path, 900)
    data = gzip.compress((tmp_path / "0.jsonl").read_bytes())
    (tmp_path / "cut.gz").write_bytes(data[: len(data) * 2 // 3])
    source = pairs_source(tmp_path, ["cut.gz"], max_length=500)
    found, report = read(processor, source)
    assert 100 < len(found) < 900
    assert found == list(range(len(found)))
    assert report.rejected("pairs")["shard damaged"] == 1


def test_of_a_cut_tar_what_is_whole_is_read(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_tar(
        tmp_path / "a.tar", {f"{i}.{e}": png(i) if e == "png" else b"text" for i in range(8) for e in ("png", "txt")}
    )
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: 512 * 4 * 5 + 700])
    found, report = read(processor, pairs_source(tmp_path, ["a.tar"], type="webdataset"))
    assert found == [0, 1, 2, 3, 4]
    assert report.rejected("webdataset") == {"shard damaged": 1}


def test_an_empty_shard_is_no_damage(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_pairs(tmp_path, 3)
    (tmp_path / "1.jsonl").write_bytes(b"")
    (tmp_path / "2.jsonl").write_bytes(b"\n\n  \n")
    found, report = read(processor, pairs_source(tmp_path, ["{0..2}.jsonl"]))
    assert found == [0, 1, 2]
    assert report.rejected("pairs") == {}


@pytest.mark.parametrize("type", ["mmc4", "documents", "lists", "webdataset"])
def test_a_lone_surrogate_is_counted(tmp_path: Path, processor: MMInterleavedProcessor, type: str) -> None:
    names = write_images(tmp_path, 2)
    records = {
        "mmc4": [mmc4([f"a {half}", "b"], [(n, i, 0.5) for i, n in enumerate(names)]) for half in ("", "\ud83d")],
        "documents": [{"segments": [{"image": names[0]}, {"text": f"a {half}"}]} for half in ("", "\ud83d")],
        "lists": [{"texts": [f"a {half}", None], "images": [None, names[0]]} for half in ("", "\ud83d")],
        "webdataset": [{"caption": f"a {half}"} for half in ("", "\ud83d")],
    }[type]
    if type == "webdataset":
        files = {f"{i}.{e}": png(i) if e == "png" else json.dumps(r).encode()
                 for i, r in enumerate(records) for e in ("png", "json")}  # fmt: skip
        write_tar(tmp_path / "a", files)
    else:
        write_lines(tmp_path / "a", records)
    kind = "documents" if type == "lists" else type
    options = {"single_image_prob": 0.0} if type == "mmc4" else {}
    _, report = read(processor, pairs_source(tmp_path, ["a"], type=kind, **options))
    assert report.counts(kind)["documents"] == 1
    assert report.rejected(kind) == {"line with a lone surrogate": 1}


def test_links_in_a_folder_of_images_are_followed(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    """Of folders and of files; `images -> elsewhere` is how large sets are kept on another disk."""
    folder = tmp_path / "data"
    write_pairs(folder, 3)
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "1.png").rename(tmp_path / "one.png")
    (tmp_path / "elsewhere" / "1.png").symlink_to("../one.png")
    found, report = read(processor, pairs_source(folder, ["0.jsonl"]))
    assert found == [0, 1, 2]
    assert report.rejected("pairs") == {}


# ---- lines


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not JSON", "line neither JSON nor a Python literal"),
        ('{"image": "0.png", "capt', "line neither JSON nor a Python literal"),
        ("[1, 2]", "line not an object"),
        ("null", "line not an object"),
        (b"\xff\xfe\x00", "line not UTF-8"),
        ("[" * 100_000, "line neither JSON nor a Python literal"),
        (rb'{"image": "images/0.png", "caption": "a \ud83d"}', "line with a lone surrogate"),
        (rb'{"image": "images/\udc80.png", "caption": "a"}', "line with a lone surrogate"),
        (rb"{'image': 'images/0.png', 'caption': 'a \ud83d'}", "line with a lone surrogate"),
        (b'{"image": "images/0.png", "caption": "a", "caption": "b"}', "line with a key twice"),
        ({"image": "images/0.png"}, "'caption' missing"),
        ({"image": "images/0.png", "caption": 7}, "'caption' malformed"),
        ({"image": "images/0.png", "caption": ["a", 7]}, "'caption' malformed"),
        ({"image": "images/0.png", "caption": "  "}, "caption too short"),
        ({"caption": "a"}, "image without a name"),
        ({"image": "", "caption": "a"}, "image without a name"),
        ({"image": "a\0b", "caption": "a"}, "image without a name"),
        ({"image": ["a"], "caption": "a"}, "image without a name"),
        ({"image": "gone.png", "caption": "a"}, "image missing"),
        ({"image": "images", "caption": "a"}, "image is a folder"),
        ({"image": "../secret.png", "caption": "a"}, "image outside its folder"),
        ({"image": "/etc/passwd", "caption": "a"}, "image outside its folder"),
        ({"image": "dir/../../secret.png", "caption": "a"}, "image outside its folder"),
        ({"image": "https://x.org/a.png", "caption": "a"}, "image is a URL"),
        ({"image": "x" * 5000, "caption": "a"}, "image missing"),
    ],
)
def test_a_bad_line_is_counted_with_its_place(
    tmp_path: Path, processor: MMInterleavedProcessor, line: Any, reason: str
) -> None:
    folder = tmp_path / "data"
    write_pairs(folder, 3)
    (tmp_path / "secret.png").write_bytes(png(9))
    good = (folder / "0.jsonl").read_bytes().splitlines()
    write_lines(folder / "0.jsonl", [good[0], line, *good[1:]])
    found, report = read(processor, pairs_source(folder, ["0.jsonl"]))
    assert found == [0, 1, 2]
    assert report.rejected("pairs") == {reason: 1}
    assert "0.jsonl, line 2" in report.examples("pairs")[reason]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"similarity_matrix": None}, "'similarity_matrix' missing"),
        ({"image_info": None}, "'image_info' missing"),
        ({"image_info": [3]}, "'image_info' malformed"),
        ({"text_list": None}, "'text_list' missing"),
        ({"text_list": ["a", 3]}, "'text_list' malformed"),
    ],
)
def test_a_bad_record_of_mmc4_is_counted(
    tmp_path: Path, processor: MMInterleavedProcessor, change: dict[str, Any], reason: str
) -> None:
    names = write_images(tmp_path, 2)
    good = mmc4(["a", "b"], [(n, i, 0.5) for i, n in enumerate(names)])
    bad = {k: v for k, v in {**good, **change}.items() if v is not None}
    write_lines(tmp_path / "a.jsonl", [bad, good])
    found, report = read(processor, pairs_source(tmp_path, ["a.jsonl"], type="mmc4"))
    assert found == [0, 1]
    assert report.rejected("mmc4") == {reason: 1}


@pytest.mark.parametrize("index", [2, -1, 99, None, "0", True, 0.0])
def test_a_image_at_a_sentence_that_is_not_there_is_dropped(
    tmp_path: Path, processor: MMInterleavedProcessor, index: Any
) -> None:
    names = write_images(tmp_path, 2)
    record = mmc4(["a", "b"], [(names[0], index, 0.5), (names[1], 1, 0.5)])
    write_lines(tmp_path / "a.jsonl", [record])
    found, report = read(processor, pairs_source(tmp_path, ["a.jsonl"], type="mmc4", single_image_prob=0.0))
    assert found == [1]
    assert report.rejected("mmc4") == {"sentence index out of range": 1}


# ---- images


def large(path: Path) -> None:
    PIL.Image.new("1", (20_000, 20_000)).save(path, "PNG")


def cmyk(path: Path) -> None:
    PIL.Image.new("CMYK", (16, 16), (255, 255, 0, 0)).save(path, "JPEG", quality=100)


def animated(path: Path) -> None:
    frames = [PIL.Image.new("RGB", (16, 16), (i, 0, 128)) for i in (200, 10, 20)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def cut(path: Path) -> None:
    PIL.Image.effect_noise((64, 64), 90).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:1500])


BAD_IMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: path.write_bytes(b""), "image empty"),
    (lambda path: path.write_bytes(b"<html>not found</html>"), "image unreadable"),
    (large, "image too large"),
    (cut, "image damaged"),
]


@pytest.mark.parametrize(("make", "reason"), BAD_IMAGES)
@pytest.mark.parametrize("probe", [True, False])
def test_a_pair_with_a_bad_image_is_left_out(
    tmp_path: Path, processor: MMInterleavedProcessor, make: Callable[[Path], Any], reason: str, probe: bool
) -> None:
    names = write_pairs(tmp_path, 8)
    make(tmp_path / "images" / "3.png")
    source = pairs_source(tmp_path, names, probe_images=probe)
    made = loader(processor, source)
    batches = list(made)
    assert sorted(numbers(batches)) == [0, 1, 2, 4, 5, 6, 7]
    assert "3" not in processor.decode_text([i for b in batches for i in b.input_ids[0].tolist()])
    found = made.report().rejected("pairs")
    expected = reason if probe or reason == "image empty" else "image damaged"
    assert {k: v for k, v in found.items() if k != "row without an image"} == {expected: 1}
    assert "3.png" in made.report().examples("pairs")[expected]


@pytest.mark.parametrize(("make", "reason"), BAD_IMAGES)
def test_a_document_loses_a_bad_image_and_keeps_its_text(
    tmp_path: Path, processor: MMInterleavedProcessor, make: Callable[[Path], Any], reason: str
) -> None:
    names = write_images(tmp_path, 3)
    make(tmp_path / "1.png")
    write_lines(tmp_path / "a.jsonl", [mmc4(["zero", "one", "two"], [(n, i, 0.5) for i, n in enumerate(names)])])
    made = loader(processor, pairs_source(tmp_path, ["a.jsonl"], type="mmc4", max_length=100))
    (batch,) = made
    assert numbers([batch]) == [0, 2]
    assert processor.decode_text(batch.input_ids[0].tolist()).split() == ["zero", "one", "two"]
    assert int((batch.input_ids == processor.image_token_id).sum()) == 2 * processor.num_image_tokens
    assert made.report().rejected("mmc4") == {reason: 1}


def test_odd_images_are_read(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    """CMYK becomes RGB; of an animation the first frame counts."""
    names = write_pairs(tmp_path, 3)
    cmyk(tmp_path / "images" / "0.png")
    animated(tmp_path / "images" / "1.png")
    made = loader(processor, pairs_source(tmp_path, names, shuffle=0, max_length=100))
    (batch,) = made
    assert [round(v / 255, 1) for v in batch.pixel_values[0, :, 9, 9].tolist()] == [0.0, 0.0, 1.0]
    assert numbers([batch])[1:] == [200, 2]
    assert made.report().rejected("pairs") == {}


def test_large_jpegs_can_be_decoded_at_a_fraction(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    """An option, since pixels change a little: 8 x 8 blocks are averaged by the decoder."""
    names = write_pairs(tmp_path, 1)
    smooth = PIL.Image.linear_gradient("L").resize((1600, 1200)).convert("RGB")
    smooth.save(tmp_path / "images" / "0.png", "JPEG", quality=95)
    plain, draft = (
        next(iter(loader(processor, pairs_source(tmp_path, names, draft_jpeg=on)))).pixel_values for on in (False, True)
    )
    assert 0 < (plain.int() - draft.int()).abs().max() < 12


# ---- a source without anything


def test_a_source_that_gives_nothing_raises_with_its_counts(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    write_lines(tmp_path / "0.jsonl", [{"image": "gone.png", "caption": "a"}] * 5 + ["junk"])
    source = pairs_source(tmp_path, ["{0..1}.jsonl"], name="web")
    for workers in (0, 2):
        with pytest.raises(DataError) as raised:
            list(loader(processor, source, num_workers=workers))
        message = str(raised.value)
        assert "source 'web' gave no batch in a whole pass" in message
        assert "5 x image missing (0.jsonl, line " in message
        assert "1 x shard missing" in message


@pytest.mark.parametrize("sampling", ["longest", "sum", "shortest", "forever"])
def test_an_empty_source_is_noticed_in_any_mixture(
    tmp_path: Path, processor: MMInterleavedProcessor, sampling: str
) -> None:
    good = pairs_source(tmp_path, write_pairs(tmp_path, 30), name="good")
    write_lines(tmp_path / "bad.jsonl", ["junk"])
    bad = pairs_source(tmp_path, ["bad.jsonl"], name="bad")
    with pytest.raises(DataError, match="'bad' gave no batch"):
        list(zip(loader(processor, good, bad, sampling=sampling), range(200), strict=False))


def test_a_folder_that_is_not_there_is_named_at_once(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    with pytest.raises(DataError, match=r"source 'pairs': there is no folder .*nowhere"):
        loader(processor, pairs_source(tmp_path / "nowhere", ["a.jsonl"]))
    with pytest.raises(DataError, match=r"there is no folder .*none"):
        loader(processor, pairs_source(tmp_path, ["a.jsonl"], image_root=str(tmp_path / "none")))


def test_a_image_too_large_for_a_row_is_explained(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    source = SourceConfig("documents", root=str(tmp_path), shards=["a.jsonl"], max_length=4, shuffle=0)
    write_images(tmp_path, 1)
    write_lines(tmp_path / "a.jsonl", [{"segments": [{"image": "0.png"}]}] * 9)
    with pytest.raises(DataError, match="source 'documents': an image of 5 tokens does not fit into a row of 4"):
        list(loader(processor, source))


# ---- reports


def test_reports_add_up() -> None:
    one, two = DataReport(), DataReport()
    for report, number in ((one, 1), (two, 2)):
        report.count("a", "records", number)
        report.reject("a", "bad", f"example {number}")
    two.reject("b", "worse")
    one.merge(json.loads(json.dumps(two.to_dict())))
    assert one.counts("a") == {"records": 3}
    assert one.rejected("a") == {"bad": 2}
    assert one.examples("a") == {"bad": "example 1"}
    assert one.sources == ["a", "b"]
    assert list(one.lines("b"))[1:] == ["1 x worse"]
    assert DataReport(one.drain()).rejected("b") == {"worse": 1}
    assert one.to_dict() == {}


def test_workers_report_together(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    names = write_pairs(tmp_path, 40, shards=4)
    for number in (3, 5, 8):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"")
    found, report = read(processor, pairs_source(tmp_path, names), num_workers=2)
    assert len(found) == 37
    assert report.rejected("pairs")["image empty"] == 3
    assert report.counts("pairs")["documents"] == 37
    assert report.counts("pairs")["images"] == 37
