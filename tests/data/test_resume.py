"""Stopping anywhere and going on there; ranks and workers; the same seed, the same batches."""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from mm_interleaved.data import DataConfig, DataError, SourceConfig, build_loader, grouping, shards
from mm_interleaved.data.shards import LineShards, digest_files
from mm_interleaved.processor import Batch, MMInterleavedProcessor

from . import world
from .world import ROW, loader, mmc4, numbers, pairs_source, write_images, write_lines, write_pairs, write_tar

LONGEST = 25  # batches of an epoch that are compared


@pytest.fixture(scope="module", autouse=True)
def _short_windows() -> Iterator[None]:
    """Windows of grouped batches that end within a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "WINDOW", 5)
        yield


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Every type of source and of compression, with some damage."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "pairs", 31, shards=3)
        with (folder / "pairs" / "1.jsonl").open("a") as file:
            file.write("not JSON\n\n{'image': 'images/3.png', 'caption': 'a literal'}\n")
        names = write_images(folder / "mmc4" / "images", 30)
        (folder / "mmc4" / "images" / "4.png").write_bytes(world.png(4)[:60])  # its header can be read
        records = [
            mmc4([f"sentence {i}", "so on", "end"], [(names[(3 * i + k) % 30], k, 0.2 + 0.1 * k) for k in range(3)])
            for i in range(24)
        ]
        write_lines(folder / "mmc4" / "docs_0.jsonl.zip", records[:9])
        write_lines(folder / "mmc4" / "docs_1.jsonl.gz", records[9:15])
        write_lines(folder / "mmc4" / "docs_2.jsonl", records[15:])
        (folder / "mmc4" / "docs_3.jsonl.zip").write_bytes(b"PK\3\4 no archive")
        (folder / "tar").mkdir()
        for shard in range(2):
            files = {}
            for i in range(7):
                files[f"{shard}{i}.png"], files[f"{shard}{i}.txt"] = world.png(40 + 7 * shard + i), b"Words"
            write_tar(folder / "tar" / f"{shard}.tar", files)
        yield folder


def config(folder: Path, packing: str = "stream", **options: Any) -> DataConfig:
    """All of them mixed; all but the pairs are packed by `packing`."""
    shared = {"max_length": ROW, "shuffle": 5}
    sources = [
        SourceConfig("pairs", root=str(folder / "pairs"), shards=["{0..2}.jsonl"], batch_size=2,
                     few_shot_merge_prob=0.5, max_images_per_sequence=2, **shared),
        SourceConfig("mmc4", root=str(folder / "mmc4"), shards=["docs_{0..4}.jsonl"], batch_size=1, keep_remainder=True,
                     image_root=str(folder / "mmc4/images"), single_image_prob=0.2, packing=packing,
                     **{**shared, "max_length": 40}),
        SourceConfig("webdataset", root=str(folder / "tar"), shards=["*.tar"], batch_size=1, keep_remainder=True,
                     packing=packing, **shared),
    ]  # fmt: skip
    return DataConfig(sources=sources, **{"pin_memory": False, "seed": 3, **options})


def same(a: Batch, b: Batch) -> bool:
    """Whether two batches are equal in every value."""
    return a.source == b.source and list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    """A state as a checkpoint keeps it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert len(json.dumps(state)) < 40_000
    return torch.load(buffer, weights_only=True)


@pytest.mark.filterwarnings("ignore:source 'pairs' has Python literals")
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    epoch=st.integers(0, 2),
    options=st.fixed_dictionaries(
        {
            "sampling": st.sampled_from(["longest", "sum", "shortest", "forever"]),
            "mix": st.sampled_from(["batch", "row"]),
            "group_by_length": st.booleans(),
            "seed": st.integers(0, 3),
        }
    ),
    shuffle=st.sampled_from([0, 1, 3, 100]),
    packing=st.sampled_from(["stream", "samples", "single"]),
    num_samples=st.sampled_from([None, 4, 50]),
    split=st.sampled_from([(0, 1), (1, 2), (2, 4)]),
)
def test_going_on_equals_an_unbroken_run(
    folder: Path, processor: MMInterleavedProcessor, stops: list[int], epoch: int, options: dict[str, Any],
    shuffle: int, packing: str, num_samples: int | None, split: tuple[int, int],
) -> None:  # fmt: skip
    settings = config(folder, packing, **options)
    sources = [replace(source, shuffle=shuffle, num_samples=num_samples) for source in settings.sources]
    settings = replace(settings, sources=sources)

    def make() -> Any:
        made = build_loader(settings, processor, rank=split[0], world_size=split[1])
        made.set_epoch(epoch)
        return made

    unbroken = make()
    try:
        expected = list(itertools.islice(unbroken, LONGEST))
    except DataError:  # this rank's part of the shortest source is damaged, or all parts are short
        assert options["sampling"] == "shortest" or num_samples == 4
        reject()
    current, done = make(), 0
    for stop in stops:
        got = list(itertools.islice(current, stop)) if stop else []
        assert all(same(a, b) for a, b in zip(got, expected[done:], strict=False))
        done += len(got)
        if len(got) < stop:  # the epoch is over
            break
        state = through_file(current.state_dict())
        current = make()
        current.load_state_dict(state)
    else:
        rest = list(itertools.islice(current, LONGEST - done))
        assert len(rest) == len(expected) - done
        assert all(same(a, b) for a, b in zip(rest, expected[done:], strict=True))
    if done < LONGEST:
        assert current.report().to_dict() == unbroken.report().to_dict()


@pytest.mark.filterwarnings("ignore:source 'pairs' has Python literals")
@pytest.mark.parametrize(
    ("workers", "method"), [(1, None), (2, None), pytest.param(1, "spawn", marks=pytest.mark.slow)]
)
def test_going_on_with_worker_processes(
    folder: Path, processor: MMInterleavedProcessor, workers: int, method: str | None
) -> None:
    settings = config(folder, num_workers=workers, start_method=method, sampling="sum")
    unbroken = build_loader(settings, processor)
    expected = list(unbroken)
    first = build_loader(settings, processor)
    got = list(itertools.islice(first, 5))
    state = through_file(first.state_dict())
    second = build_loader(settings, processor)
    second.load_state_dict(copy.deepcopy(state))
    got += list(second)
    assert len(got) == len(expected)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    assert second.report().to_dict() == unbroken.report().to_dict()
    assert second.epoch == 1


def test_a_state_between_epochs_begins_the_next(folder: Path, processor: MMInterleavedProcessor) -> None:
    source = pairs_source(folder / "pairs", ["0.jsonl"])
    first = loader(processor, source)
    epoch0, state = list(first), first.state_dict()
    second = loader(processor, source)
    second.load_state_dict(through_file(state))
    assert all(same(a, b) for a, b in zip(second, first, strict=True))
    assert numbers(second) != numbers(epoch0)


def test_going_on_reads_nothing_before_the_window(
    folder: Path, processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pairs_source(folder / "pairs", ["{0..2}.jsonl"], shuffle=2, shuffle_shards=False)
    first = loader(processor, source)
    list(itertools.islice(first, 12))
    state = first.state_dict()
    read: list[int] = []
    path_of = LineShards._path
    monkeypatch.setattr(LineShards, "_path", lambda self, shard: (read.append(shard), path_of(self, shard))[1])
    second = loader(processor, source)
    second.load_state_dict(state)
    assert next(iter(second)) is not None
    assert read
    assert 0 not in read


DATA = {
    "pairs": ("pairs", "0.jsonl"), "mmc4": ("mmc4", "docs_2.jsonl"), "webdataset": ("tar", "1.tar"),
    "documents": ("own", "0.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DATA)
def test_a_run_does_not_go_on_with_other_data(
    kind: str, folder: Path, processor: MMInterleavedProcessor, tmp_path: Path
) -> None:
    """Not with another word of the same length, nor without a file; but with a copy, whose times are new."""
    place, changed = DATA[kind]
    data = tmp_path / place
    if kind == "documents":
        write_images(data, 3)
        write_lines(data / changed, [{"segments": [{"image": f"{i}.png"}, {"text": "Words"}]} for i in range(3)])
    else:
        shutil.copytree(folder / place, data)
    pattern = {"pairs": "{0..2}.jsonl", "mmc4": "docs_{0..2}.jsonl", "webdataset": "{0..1}.tar"}.get(kind, changed)
    images = str(data / "images") if kind == "mmc4" else None
    source = SourceConfig(kind, root=str(data), image_root=images, shards=[pattern], batch_size=1, max_length=40,
                          keep_remainder=True)  # fmt: skip
    first = loader(processor, source)
    next(iter(first))
    state = through_file(first.state_dict())

    def go_on() -> None:
        second = loader(processor, source)
        second.load_state_dict(copy.deepcopy(state))
        next(iter(second), None)

    os.utime(data / changed, (1, 1))
    go_on()
    before = (data / changed).read_bytes()
    word = next(word for word in (b"Words", b"so on", b"caption") if word in before)
    (data / changed).write_bytes(before.replace(word, b"X" * len(word), 1))
    with pytest.raises(DataError, match=rf"other data: 'sources\.{kind}\.digest' was"):
        go_on()
    (data / changed).unlink()
    with pytest.raises(DataError, match="other data"):
        go_on()


def test_the_digest_of_many_and_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files that are too large or too many it has a part only: sizes, beginnings and ends."""
    monkeypatch.setattr(shards, "PART", 4)
    monkeypatch.setattr(shards, "READ", 2)
    files = {name: tmp_path / name for name in "abcd"}
    for path in files.values():
        path.write_bytes(b"0123456789")

    def digest() -> str:
        return digest_files(list(files), lambda name: path if (path := files[name]).is_file() else None)

    before = digest()
    files["b"].write_bytes(b"9999999999")  # a and c are read
    files["a"].write_bytes(b"0123xx6789")
    assert digest() == before
    for name, content in (("c", b"0123456780"), ("a", b"1123456789"), ("b", b"99")):
        kept = files[name].read_bytes()
        files[name].write_bytes(content)
        assert digest() != before
        files[name].write_bytes(kept)
    assert digest() == before
    files["d"].unlink()
    assert digest() != before


def test_a_state_of_other_settings_is_refused(folder: Path, processor: MMInterleavedProcessor) -> None:
    source = pairs_source(folder / "pairs", ["{0..2}.jsonl"])
    first = loader(processor, source)
    next(iter(first))
    second = loader(processor, source, seed=9)
    second.load_state_dict(first.state_dict())
    with pytest.raises(DataError, match="other data settings"):
        next(iter(second))
    with pytest.raises(DataError, match="other data settings"):
        loader(processor, source, seed=9, num_workers=1).load_states([first.state_dict()])
    with pytest.raises(DataError, match="is that of process 0 of 1, and this is process 1 of 2"):
        loader(processor, source, rank=1, world_size=2).load_state_dict(first.state_dict())


def test_another_number_of_workers_is_refused(folder: Path, processor: MMInterleavedProcessor) -> None:
    source = pairs_source(folder / "pairs", ["{0..2}.jsonl"])
    for before, now in ((2, 1), (2, 0), (0, 2)):
        first = loader(processor, source, num_workers=before)
        next(iter(first))
        with pytest.raises(DataError, match=f"saved with {before} workers, but 'num_workers' is {now}"):
            loader(processor, source, num_workers=now).load_state_dict(first.state_dict())


def test_data_that_changed_are_noticed(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    source = pairs_source(tmp_path, write_pairs(tmp_path, 20, words=2), shuffle=0, cut="image")
    first = loader(processor, source)
    list(itertools.islice(first, 3))
    state = first.state_dict()
    lines = (tmp_path / "0.jsonl").read_text().replace('"item', '"another item')
    (tmp_path / "0.jsonl").write_text(lines)
    second = loader(processor, source)
    second.load_state_dict(state)
    with pytest.raises(DataError, match=r"other data: 'sources\.pairs\.digest' was"):
        next(iter(second))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world_size=st.integers(1, 5),
    shards=st.integers(1, 6),
    shuffle=st.sampled_from([0, 4, 100]),
    epoch=st.integers(0, 1),
)
def test_ranks_read_everything_once(
    processor: MMInterleavedProcessor, world_size: int, shards: int, shuffle: int, epoch: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        source = pairs_source(Path(name), write_pairs(Path(name), 40, shards), shuffle=shuffle)
        seen = []
        for rank in range(world_size):
            part = loader(processor, source, rank=rank, world_size=world_size)
            part.set_epoch(epoch)
            seen += numbers(part)
    assert sorted(seen) == list(range(40))


@pytest.mark.parametrize("shards", [1, 7])
def test_ranks_and_workers_read_everything_once(tmp_path: Path, processor: MMInterleavedProcessor, shards: int) -> None:
    source = pairs_source(tmp_path, write_pairs(tmp_path, 40, shards))
    parts = [loader(processor, source, rank=rank, world_size=2, num_workers=2) for rank in range(2)]
    assert sorted(itertools.chain(*map(numbers, parts))) == list(range(40))
    assert sum(p.report().counts("pairs").get("shards", 0) for p in parts) == shards


def test_the_same_seed_gives_the_same_batches(folder: Path, processor: MMInterleavedProcessor) -> None:
    def read(**options: Any) -> list[Batch]:
        return list(loader(processor, pairs_source(folder / "pairs", ["{0,2}.jsonl"]), **options))

    assert all(same(a, b) for a, b in zip(read(), read(), strict=True))
    assert numbers(read()) != numbers(read(seed=1))


def test_epochs_differ_and_can_be_chosen(folder: Path, processor: MMInterleavedProcessor) -> None:
    source = pairs_source(folder / "pairs", ["{0,2}.jsonl"])
    one = loader(processor, source)
    epochs = [list(one), list(one)]
    assert numbers(epochs[0]) != numbers(epochs[1])
    again = loader(processor, source)
    again.set_epoch(1)
    assert all(same(a, b) for a, b in zip(epochs[1], again, strict=True))


def test_loading_leaves_the_global_generators_alone(folder: Path, processor: MMInterleavedProcessor) -> None:
    before = torch.random.get_rng_state()
    list(loader(processor, pairs_source(folder / "pairs", ["0.jsonl"])))
    assert torch.equal(before, torch.random.get_rng_state())
