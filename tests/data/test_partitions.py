"""Runs that go on with another number of processes or workers read every document of an epoch exactly once."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_interleaved.data import DataConfig, DataError, DocumentLoader, SourceConfig, build_loader, grouping
from mm_interleaved.data.partitions import deal, whole_partition
from mm_interleaved.data.stream import Place
from mm_interleaved.processor import MMInterleavedProcessor

from .test_resume import through_file
from .world import numbers, pairs_source, write_pairs, write_tar

NUMBER = 60  # images of an epoch
Layout = tuple[int, int]  # processes, workers of each


@pytest.fixture(scope="module", autouse=True)
def _short_windows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "WINDOW", 3)
        yield


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        write_pairs(Path(name), NUMBER, shards=5)
        yield Path(name)


class Ranks:
    """The loaders of all processes of a run, which take one batch each in every round."""

    def __init__(self, config: DataConfig, processor: MMInterleavedProcessor, layout: Layout) -> None:
        processes, workers = layout
        config = replace(config, num_workers=workers)
        self.loaders = [build_loader(config, processor, rank=r, world_size=processes) for r in range(processes)]
        self.batches = [self._endless(loader) for loader in self.loaders]

    @staticmethod
    def _endless(loader: DocumentLoader) -> Iterator[tuple[int, list[int]]]:
        while True:
            epoch = loader.epoch
            yield from ((epoch, numbers([batch])) for batch in loader)

    def round(self) -> list[tuple[int, list[int]]]:
        """For each process the epoch and the images of its next batch."""
        return [next(batches) for batches in self.batches]

    def states(self) -> list[dict[str, Any]]:
        return [through_file(loader.state_dict()) for loader in self.loaders]


def read(
    config: DataConfig, processor: MMInterleavedProcessor, layouts: Sequence[Layout], rounds: Sequence[int], epochs: int
) -> tuple[dict[int, list[int]], list[list[int]]]:
    """The images of the first epochs, and the batches in their order over all processes.

    Each layout reads its number of rounds, and the last one until all processes are beyond these epochs.
    """
    images: dict[int, list[int]] = defaultdict(list)
    batches, states = [], None
    for layout, limit in zip(layouts, [*rounds, 10_000], strict=True):
        ranks = Ranks(config, processor, layout)
        if states is not None:
            for loader in ranks.loaders:
                loader.load_states(states)
        for _ in range(limit):
            found = ranks.round()
            batches += [own for _, own in found]
            for epoch, own in found:
                images[epoch] += own
            if all(epoch >= epochs for epoch, _ in found):
                break
        states = ranks.states()
    return images, batches


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    processes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    rounds=st.lists(st.integers(0, 12), min_size=3, max_size=3),
    shards=st.sampled_from([1, 5]),
    shuffle=st.sampled_from([0, 4]),
    packing=st.sampled_from(["stream", "samples", "single"]),
    group_by_length=st.booleans(),
)
def test_every_document_is_read_once_in_every_epoch(
    folder: Path, processor: MMInterleavedProcessor, processes: list[int], rounds: list[int], shards: int, shuffle: int,
    packing: str, group_by_length: bool,
) -> None:  # fmt: skip
    names = [f"{shard}.jsonl" for shard in range(shards)]
    source = pairs_source(folder, names, shuffle=shuffle, packing=packing)
    config = DataConfig(sources=[source], pin_memory=False, group_by_length=group_by_length)
    layouts = [(number, 0) for number in processes]
    images, _ = read(config, processor, layouts, rounds[: len(layouts) - 1], epochs=2)
    expected = sorted(n for shard in range(shards) for n in range(shard, NUMBER, 5))
    for epoch in range(2):
        assert sorted(images[epoch]) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_four_two_and_three_processes(folder: Path, processor: MMInterleavedProcessor, workers: int) -> None:
    source = pairs_source(folder, ["{0..4}.jsonl"], shuffle=4)
    config = DataConfig(sources=[source], pin_memory=False)
    images, _ = read(config, processor, [(4, workers), (2, workers), (3, workers)], [3, 5], epochs=1)
    assert sorted(images[0]) == list(range(NUMBER))


def test_other_numbers_of_workers(folder: Path, processor: MMInterleavedProcessor) -> None:
    config = DataConfig(sources=[pairs_source(folder, ["{0..4}.jsonl"])], pin_memory=False)
    images, _ = read(config, processor, [(1, 2), (2, 0), (1, 1)], [7, 4], epochs=1)
    assert sorted(images[0]) == list(range(NUMBER))


@pytest.mark.parametrize("processes", [(2, 1, 2), (2, 4, 2), (1, 3, 1)])
def test_the_order_over_all_processes_stays(
    folder: Path, processor: MMInterleavedProcessor, processes: tuple[int, ...]
) -> None:
    """If as many batches make a step, every step has the same ones."""
    config = DataConfig(sources=[pairs_source(folder, ["{0..4}.jsonl"], shuffle=7)], pin_memory=False)
    first = processes[0]
    _, unbroken = read(config, processor, [(first, 0)], [], epochs=1)
    _, broken = read(config, processor, [(number, 0) for number in processes], [12 // n for n in processes[:2]], 1)
    assert broken[:36] == unbroken[:36]


def test_a_mixture_goes_on_with_its_reports(folder: Path, processor: MMInterleavedProcessor, tmp_path: Path) -> None:
    """Reports count each document once, although two processes may read one partition together."""
    from .world import png

    write_tar(tmp_path / "0.tar", {f"{n}.{kind}": png(100 + n) if kind == "png" else b"Words" for n in range(20)
                                   for kind in ("png", "txt")})  # fmt: skip
    shared = {"max_length": 24, "batch_size": 1, "keep_remainder": True}
    sources = [
        pairs_source(folder, ["{0..4}.jsonl"]),
        SourceConfig("webdataset", root=str(tmp_path), shards=["0.tar"], **shared),
    ]
    config = DataConfig(sources=sources, pin_memory=False, sampling="sum")
    ranks = Ranks(config, processor, (1, 0))
    seen = [image for _ in range(5) for _, own in ranks.round() for image in own]
    states = ranks.states()
    after = Ranks(config, processor, (3, 0))
    for loader in after.loaders:
        loader.load_states(states)
        seen += numbers(loader)
    assert sorted(seen) == [*range(NUMBER), *range(100, 120)]
    for name, number in (("pairs", NUMBER), ("webdataset", 20)):
        for what in ("records", "documents", "images"):
            assert sum(loader.report().counts(name).get(what, 0) for loader in after.loaders) == number, what


def test_an_order_without_a_seed_cannot_be_dealt(folder: Path, processor: MMInterleavedProcessor) -> None:
    source = pairs_source(folder, ["{0..4}.jsonl"], compat=["unseeded_order"])
    config = DataConfig(sources=[source], pin_memory=False)
    ranks = Ranks(config, processor, (2, 0))
    ranks.round()
    with pytest.raises(DataError, match="has an order that other processes cannot repeat"):
        Ranks(config, processor, (1, 0)).loaders[0].load_states(ranks.states())


@given(number=st.integers(1, 6), consumers=st.integers(1, 9), again=st.integers(1, 9))
def test_dealing_loses_and_repeats_no_batch(number: int, consumers: int, again: int) -> None:
    states = [whole_partition(Place(rank, number)) for rank in range(number)]
    dealt = [state for part in deal(states, consumers) for state in part]
    dealt = [state for part in deal(dealt, again) for state in part]
    taken = [(s["place"][0], n) for s in dealt for n in range(s["next"], 80, s["stride"])]
    assert sorted(taken) == [(rank, n) for rank in range(number) for n in range(80)]
    assert sum(state["counts"] for state in dealt) == number
