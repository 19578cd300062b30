"""Mixtures: how often, until when, what they are called; and settings that do not fit."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mm_interleaved.configuration import load_config, to_yaml
from mm_interleaved.data import DataConfig, ReplayConfig, SourceConfig
from mm_interleaved.data.mixture import Mixture, source_weights
from mm_interleaved.data.stream import Place
from mm_interleaved.processor import MMInterleavedProcessor
from mm_interleaved.processor.packing import TokenStream
from mm_interleaved.validation import ConfigError

from .world import loader, numbers, pairs_source, write_pairs


class Endless:
    """Stands for a stream that never ends."""

    report = None

    def next_row(self) -> TokenStream:
        return TokenStream.empty()


def drawn(count: int, place: Place, epoch: int = 0, **options: Any) -> list[int]:
    """The sources of that many batches."""
    probabilities = options.pop("probabilities", [1.0, 1.0, 1.0, 2.0])
    sources = [SourceConfig("documents", name=n, shards=["a"], batch_size=1) for n in "abcd"]
    config = DataConfig(sources=sources, probabilities=probabilities, sampling="forever", **options)
    mixture = Mixture(config, [Endless()] * 4, epoch, place)
    return [mixture.next_batch().sources[0] for _ in range(count)]


def test_sources_are_drawn_in_proportion() -> None:
    """Conformance 5: within three standard deviations of 10,000 draws."""
    counts = Counter(drawn(10_000, Place()))
    for source, share in enumerate((0.2, 0.2, 0.2, 0.4)):
        assert abs(counts[source] - 10_000 * share) < 3 * math.sqrt(10_000 * share * (1 - share))


def test_ranks_workers_seeds_and_epochs_draw_differently() -> None:
    sequences = [
        drawn(50, Place()), drawn(50, Place(rank=1, world_size=2)), drawn(50, Place(worker=1, num_workers=2)),
        drawn(50, Place(), epoch=1), drawn(50, Place(), seed=1),
    ]  # fmt: skip
    assert len({tuple(s) for s in sequences}) == len(sequences)
    assert drawn(50, Place()) == sequences[0]


def test_a_source_with_probability_zero_is_never_drawn() -> None:
    assert set(drawn(300, Place(), probabilities=[1.0, 0.0, 1.0, 0.0])) == {0, 2}


def test_a_fixed_ratio_gives_every_rank_another_source() -> None:
    ranks = [drawn(50, Place(rank=r, world_size=4), probabilities=[], fix_sampling_ratio=True) for r in range(4)]
    assert all(set(step) == {0, 1, 2, 3} for step in zip(*ranks, strict=True))
    assert len(set(ranks[0])) == 4


def sources(folder: Path, *counts: int, **options: Any) -> list[SourceConfig]:
    """Pairs `a`, `b`, ... of so many batches each (about one pair each)."""
    made = []
    for name, count in zip("abcd", counts, strict=False):
        shards = write_pairs(folder / name, count)
        made.append(pairs_source(folder / name, shards, name=name, max_length=15, **options))
    return made


def test_longest_ends_when_all_were_read_once(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    batches = list(loader(processor, *sources(tmp_path, 3, 12)))
    found = {n: [b for b in batches if b.source == n] for n in "ab"}
    assert set(numbers(found["b"])) == set(range(12))
    counts = Counter(numbers(found["a"]))
    assert set(counts) == {0, 1, 2}
    assert max(counts.values()) > 1


def test_sum_reads_everything_exactly_once(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    batches = list(loader(processor, *sources(tmp_path, 3, 12, 5), sampling="sum"))
    for name, count in (("a", 3), ("b", 12), ("c", 5)):
        assert sorted(numbers(b for b in batches if b.source == name)) == list(range(count))


def test_sum_compat_confuses_names(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    """An exhausted source goes, its name stays: the names of those after it slip."""
    made = loader(processor, *sources(tmp_path, 2, 20), sampling="sum", compat=["shifted_names"])
    names = [b.source for b in made]
    assert len(numbers(loader(processor, *sources(tmp_path, 2, 20), sampling="sum"))) == 22
    assert names[-1] == "a"
    assert names.count("a") > 2


def test_shortest_ends_with_the_first(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    batches = list(loader(processor, *sources(tmp_path, 3, 50), sampling="shortest"))
    assert sorted(numbers(b for b in batches if b.source == "a")) == [0, 1, 2]
    assert len(batches) < 30


def test_forever_goes_on_and_loses_nothing(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    """Tokens left over at the end of a pass begin the next one."""
    (source,) = sources(tmp_path, 7, keep_remainder=False)
    source = replace(source, max_length=100, cut="image")
    made = loader(processor, source, sampling="forever")
    counts = Counter(numbers(itertools.islice(made, 30)))
    assert set(counts) == set(range(7))
    assert max(counts.values()) - min(counts.values()) <= 2
    assert "remainder shorter than a row" not in made.report().rejected("a")


@pytest.mark.parametrize(("floor", "expected"), [(False, 4), (True, 3)])
def test_an_epoch_of_so_many_rows(
    tmp_path: Path, processor: MMInterleavedProcessor, floor: bool, expected: int
) -> None:
    """num_samples counts rows over all ranks and workers, whatever there is."""
    for count in (3, 60):
        (source,) = sources(tmp_path / str(count), count, num_samples=7, floor=floor, batch_size=1)
        parts = [loader(processor, source, rank=rank, world_size=2) for rank in range(2)]
        assert [len(list(p)) for p in parts] == [expected, expected]


def test_rows_of_several_sources_in_one_batch(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    made = sources(tmp_path, 60, 60, image_first_prob=0.0)
    made[1] = replace(made[1], ignore_text_before_image=True)
    batches = list(itertools.islice(loader(processor, *made, mix="row", batch_size=4), 12))
    assert all(len(b.input_ids) == 4 for b in batches)
    assert {b.source for b in batches} >= {"a+b"}
    learned = {int(n) for b in batches for n in (b.labels != -100).sum(1)}
    assert 2 in learned  # rows that ignore text before an image learn only the image's token and the end
    assert max(learned) > 2


def test_epochs_advance_in_mixtures(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    """In the original they do not."""
    made = sources(tmp_path, 9, 9)
    one = loader(processor, *made, sampling="sum")
    assert [numbers(b for b in one if b.source == "a") for _ in range(2)] != [numbers(one)] * 2
    epochs = [[b for b in one if b.source == "a"] for _ in range(2)]
    assert numbers(epochs[0]) != numbers(epochs[1])
    compat = loader(processor, *made, sampling="sum", compat=["repeated_epochs"])
    epochs = [[b for b in compat if b.source == "a"] for _ in range(2)]
    assert numbers(epochs[0]) == numbers(epochs[1])


def test_the_order_can_be_left_to_chance(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    """The original's order of samples differs from run to run; going on is exact all the same."""
    (source,) = sources(tmp_path, 30, compat=["unseeded_order"])
    runs = [numbers(loader(processor, source)) for _ in range(2)]
    assert runs[0] != runs[1]
    assert sorted(runs[0]) == sorted(runs[1]) == list(range(30))
    first = loader(processor, source)
    iterator = iter(first)
    got = numbers(itertools.islice(iterator, 10))
    second = loader(processor, source)
    second.load_state_dict(first.state_dict())
    rest = numbers(second)
    assert numbers(iterator) == rest
    assert sorted(got + rest) == list(range(30))


# ---- settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: []", "sources needs at least one source"),
        ("sources: [{type: mmc5, shards: [a]}]", "unknown source type 'mmc5' (sources[0] in "),
        ("sources: [{type: mmc4}]", "source 'mmc4' of type 'mmc4' needs 'shards'"),
        ("sources: [{shards: [a]}]", "sources[0].type must be given"),
        ("sources: [{type: pairs, shards: [a]}, {type: pairs, shards: [b]}]", "two sources are called 'pairs'"),
        ("sources: [{type: pairs, shards: [a], image_first_prob: 2}]",
         "sources[0].image_first_prob must be at most 1, not 2"),
        ("sources: [{type: pairs, shards: [a], batch_size: 0}]", "sources[0].batch_size must be at least 1, not 0"),
        ("sources: [{type: pairs, shards: [a], cut: sample}]",
         "sources[0].cut must be 'image' or 'document', not 'sample'"),
        ("sources: [{type: pairs, shards: [a], compat: [BUG-2]}]",
         "not 'BUG-2' ({file}). It is now 'merge_without_effect'"),
        ("sources: [{type: pairs, shards: a}]", "sources[0].shards must be a list"),
        ("sources: [{type: pairs, shards: [a], shufle: 3}]",
         "unknown key 'shufle' in sources[0] ({file}). Did you mean 'shuffle'?"),
        ("sources: [{type: pairs, shards: [a]}]\nprobabilities: [1, 2]", "2 'probabilities' are given for 1 sources"),
        ("sources: [{type: pairs, shards: [a]}]\nprobabilities: [-1]", "must not be negative"),
        ("sources: [{type: pairs, shards: [a]}]\nsampling: all", "sampling must be 'longest', 'sum'"),
        ("sources: [{type: pairs, shards: [a]}]\nmix: token", "mix must be 'batch' or 'row'"),
        ("sources: [{type: pairs, shards: [a]}, {type: pairs, shards: [a], name: b}]\nprobabilities: [1, 2]\n"
         "fix_sampling_ratio: true",
         "needs equal 'probabilities'"),
        ("sources: [{type: pairs, shards: [a]}, {type: pairs, shards: [a], name: b, loss_text_weight: 2}]\nmix: row",
         "same loss weights"),
        ("sources:\n- {type: pairs, shards: [a], few_shot_merge_prob: 0.5, few_shot_merge_sizes: [1]}",
         "sources[0].few_shot_merge_sizes[0] must be at least 2"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message.replace("{file}", str(path)))):
        load_config(path, DataConfig)


def test_settings_are_written_and_read(tmp_path: Path) -> None:
    config = DataConfig(
        sources=[
            SourceConfig("mmc4", shards=["docs_{0..9}.jsonl"]),
            SourceConfig("toyworld", options={"size": 128, "mix": {"story": 2.0}}),
        ],
        probabilities=[1.0, 2.0],
    )
    (tmp_path / "a.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "a.yaml", DataConfig) == config


REPLAY = ReplayConfig([SourceConfig("documents", name="old", shards=["a"])], share=0.25)


def test_replayed_sources_get_their_share() -> None:
    own = DataConfig([SourceConfig("documents", name=n, shards=["a"], batch_size=1) for n in "ab"],
                     probabilities=[3.0, 1.0], sampling="forever")  # fmt: skip
    assert source_weights(own.with_replay(REPLAY)) == pytest.approx([3.0, 1.0, 4 / 3])


@pytest.mark.parametrize("sampling", ["longest", "sum", "shortest"])
@pytest.mark.parametrize("replayed", [2, 60])
def test_a_replayed_source_does_not_decide_when_an_epoch_ends(
    tmp_path: Path, processor: MMInterleavedProcessor, sampling: str, replayed: int
) -> None:
    """It starts again if it is short, and is not read to its end if it is long."""
    own, old = sources(tmp_path, 12, replayed)
    found = list(loader(processor, own, replace(old, replay=True), sampling=sampling, replay_share=0.5))
    assert sorted(numbers([b for b in found if b.source == "a"])) == list(range(12))
    assert 3 <= sum(b.source == "b" for b in found) <= 40


def test_replay_needs_another_name_than_the_data() -> None:
    data = DataConfig([SourceConfig("documents", name="old", shards=["a"])])
    with pytest.raises(ConfigError, match="two sources are called 'old'"):
        data.with_replay(REPLAY)
