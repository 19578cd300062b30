"""Tasks as sources of training data: choices of each epoch, resuming, sharing, and what is left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as for_all
from hypothesis import strategies as st

from mm_interleaved.configuration import ConfigError, make_config
from mm_interleaved.data import DataConfig, DataError, DocumentLoader, SourceConfig, build_loader
from mm_interleaved.document import Text
from mm_interleaved.processor import MMInterleavedProcessor
from mm_interleaved.tasks import TASKS, Item, Source, TaskConfig, TaskType, given, make_task
from mm_interleaved.tasks.base import choose_answer

from .test_resume import same, through_file
from .world import png, texts, write_pairs

CAPTIONS = ("one", "two", "three")
COUNT = 11


def read_numbered(source: Source) -> Iterator[Item]:
    """Images `0.png` to `10.png`, each with three captions; `4.png` cannot be used."""
    for number in range(COUNT):
        image, problem = source.images.find(f"{number}.png")
        problem = "its caption is blank" if number == 4 else problem
        item = Item(str(number), {"image": given(image), "word": f"no {number}"}, list(CAPTIONS), [Text(CAPTIONS[0])],
                    problem=problem, place=f"numbers, {number}")  # fmt: skip
        yield choose_answer(item, [[Text(caption)] for caption in CAPTIONS])


NUMBERED = TaskType("numbered", "images with three captions", read_numbered, "text", "{image}It is", ("captions",),
                    phases=("val", "train"))  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The images of the task, of which `7.png` is missing and `9.png` is no image."""
    for number in range(COUNT):
        if number != 7:
            (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "9.png").write_bytes(b"no image")
    return tmp_path


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task, and one without a phase for training."""
    monkeypatch.setitem(TASKS._values, "numbered", NUMBERED)
    monkeypatch.setitem(TASKS._values, "asked", replace(NUMBERED, phases=("val",)))


def source(root: Path, task: str = "numbered", **options: Any) -> SourceConfig:
    """A source of that task in short rows."""
    known = {key: options.pop(key) for key in list(options) if key in SourceConfig.__dataclass_fields__}
    settings = {
        "batch_size": 1,
        "max_length": 40,
        "shuffle": 0,
        "shuffle_shards": False,
        "keep_remainder": True,
    } | known
    return SourceConfig("task", root=str(root), options={"task": task, **options}, **settings)  # type: ignore[arg-type]


def loader(processor: MMInterleavedProcessor, *sources: SourceConfig, rank: int = 0, world_size: int = 1,
           **options: Any) -> DocumentLoader:  # fmt: skip
    config = DataConfig(sources=list(sources), **{"pin_memory": False, "sampling": "sum", **options})
    return build_loader(config, processor, rank=rank, world_size=world_size)


def documents(processor: MMInterleavedProcessor, batches: Any) -> list[str]:
    """The documents of all rows, without `<s>` and `</s>`."""
    rows = "".join(row for batch in batches for row in texts(processor, batch)).replace("[] ", "[]")
    return [text.removesuffix("</s>") for text in rows.split("<s>")[1:]]


def test_a_task_is_a_source_with_an_answer_of_its_own_in_each_epoch(
    root: Path, processor: MMInterleavedProcessor
) -> None:
    made = loader(processor, source(root))
    epochs = [documents(processor, made) for _ in range(6)]
    assert {len(epoch) for epoch in epochs} == {COUNT - 3}
    assert {text for epoch in epochs for text in epoch} == {f"[]It is {caption}" for caption in CAPTIONS}
    for number in range(COUNT - 3):  # each document changes
        assert len({epoch[number] for epoch in epochs}) > 1
    again = loader(processor, source(root))
    assert [documents(processor, again) for _ in range(2)] == epochs[:2]
    assert [documents(processor, loader(processor, source(root), seed=1))] != epochs[:1]


def test_what_cannot_be_used_is_counted_by_reason(root: Path, processor: MMInterleavedProcessor) -> None:
    made = loader(processor, source(root))
    list(made)
    report = made.report()
    assert report.counts("task") | {"rows": 0, "tokens": 0} == {
        "shards": 1, "records": COUNT, "documents": COUNT - 3, "images": COUNT - 3, "rows": 0, "tokens": 0,
    }  # fmt: skip
    assert sorted(report.rejected("task").values()) == [1, 1, 1]
    assert "its caption is blank" in report.rejected("task")
    assert "7.png" in "".join(report.examples("task").values())
    assert "numbers, 4" in report.examples("task")["its caption is blank"]


@pytest.mark.parametrize("consumers", [1, 2, 3])
def test_every_item_is_read_by_one_process(root: Path, processor: MMInterleavedProcessor, consumers: int) -> None:
    config = source(root, prompt="{image}{word}", max_length=20, shuffle=4)
    seen = [documents(processor, loader(processor, config, rank=r, world_size=consumers)) for r in range(consumers)]
    numbers = sorted(int(text.split()[1]) for part in seen for text in part)
    assert numbers == [n for n in range(COUNT) if n not in (4, 7, 9)]
    assert max(map(len, seen)) - min(map(len, seen)) <= 3


def test_one_of_several_prompts_is_drawn_and_the_first_is_evaluated(
    root: Path, processor: MMInterleavedProcessor
) -> None:
    prompts = ["{image}It is", "{image}What? It is", "Here is {image} which is"]
    made = loader(processor, source(root, prompt=prompts))
    beginnings = [text.rsplit(" ", 1)[0] for _ in range(4) for text in documents(processor, made)]
    assert set(beginnings) == {"[]It is", "[]What? It is", "Here is[]which is"}
    task = make_task(TaskConfig("numbered", images=str(root), prompt=prompts, limit=1))
    assert next(task.samples()).document.segments == [given(root / "0.png"), Text("It is", supervise=False), Text()]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@for_all(
    stops=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    epoch=st.integers(0, 2),
    shuffle=st.sampled_from([0, 3, 100]),
    rank=st.integers(0, 1),
    shots=st.integers(0, 2),
)
def test_going_on_equals_an_unbroken_run(
    root: Path, processor: MMInterleavedProcessor, stops: list[int], epoch: int, shuffle: int, rank: int, shots: int
) -> None:
    config = source(root, shuffle=shuffle, shots=shots, shot_template="{image}is {answer},", shuffle_shards=True)

    def make() -> DocumentLoader:
        made = loader(processor, replace(config, max_length=None), rank=rank, world_size=2)
        made.set_epoch(epoch)
        return made

    expected, current, done = list(make()), make(), 0
    for stop in stops:
        got = list(itertools.islice(current, stop)) if stop else []
        assert all(same(a, b) for a, b in zip(got, expected[done:], strict=False))
        done += len(got)
        if len(got) < stop:
            return
        state = through_file(current.state_dict())
        current = make()
        current.load_state_dict(state)
    rest = list(current) if done < len(expected) else []
    assert len(rest) == len(expected) - done
    assert all(same(a, b) for a, b in zip(rest, expected[done:], strict=True))


def test_going_on_with_other_items_is_refused(root: Path, processor: MMInterleavedProcessor) -> None:
    made = loader(processor, source(root))
    next(iter(made))
    other = loader(processor, source(root, limit=6))
    other.load_state_dict(made.state_dict())
    with pytest.raises(DataError, match="belongs to other data settings"):
        next(iter(other))


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("asked", {}, "no phase for training; its phases are val"),
        ("vqav2", {}, "does not exist. Get questions and annotations"),
        ("numbered", {"phase": "test"}, "there is no phase 'test'"),
        ("numbered", {"limmit": 3}, "limmit"),
        ("numbered", {"prompt": []}, "'prompt' is an empty list"),
        ("numbers", {}, "numbered"),
    ],
)
def test_settings_that_cannot_be_used(
    task: str, options: dict[str, Any], words: str, root: Path, processor: MMInterleavedProcessor
) -> None:
    with pytest.raises(DataError, match=words):
        loader(processor, source(root, task, **options))


def test_a_prompt_with_an_unknown_field_leaves_everything_out(root: Path, processor: MMInterleavedProcessor) -> None:
    made = loader(processor, source(root, prompt="{image}{question}"))
    with pytest.raises(DataError, match=r"has a field \{question\}; there is image, word"):
        list(made)


def test_items_are_read_once(root: Path, processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def read(source: Source) -> Iterator[Item]:
        reads.append(source.phase)
        return read_numbered(source)

    monkeypatch.setitem(TASKS._values, "numbered", replace(NUMBERED, read=read))
    made = loader(processor, source(root))
    for _ in range(3):
        list(made)
    assert reads == ["train"]


def test_an_item_that_cannot_be_varied_is_counted(
    root: Path, processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(source: Source) -> Iterator[Item]:
        first, second, third, *others = read_numbered(source)
        yield from (first, second, replace(third, vary=lambda rng: replace(third, answer=[])), *others)

    monkeypatch.setitem(TASKS._values, "numbered", replace(NUMBERED, read=read))
    made = loader(processor, source(root))
    assert len(documents(processor, made)) == COUNT - 4
    assert made.report().rejected("task")["N slots, but N answers to learn"] == 1


def test_a_choice_of_several_answers_is_even() -> None:
    item = choose_answer(Item("0", {}, answer=[Text("a")]), [[Text("a")], [Text("b")]])
    rng = np.random.default_rng(0)
    assert item.vary is not None
    drawn = [item.vary(rng).answer[0] for _ in range(400)]
    assert 150 < drawn.count(Text("a")) < 250
    single = choose_answer(item, [[Text("a")]])
    assert single is item


def test_sources_come_by_the_square_root_of_their_size(root: Path, processor: MMInterleavedProcessor) -> None:
    """Nine items against one: three batches against one, for as long as one likes."""
    sources = [source(root, name="many", prompt="{image}{word}", limit=9), source(root, name="few", limit=1)]
    sources = [replace(s, packing="single") for s in sources]
    made = loader(processor, *sources, probabilities="sqrt_size", sampling="forever")
    assert made.config.probabilities == [3, 1]
    names = [batch.source for batch in itertools.islice(made, 400)]
    assert 270 < names.count("many") < 330


def test_sizes_that_are_not_known_are_named(root: Path, processor: MMInterleavedProcessor) -> None:
    names = write_pairs(root / "pairs", 3)
    pairs = SourceConfig("pairs", root=str(root / "pairs"), shards=names)
    with pytest.raises(DataError, match="documents of source 'pairs', which sources of type 'pairs' do not know"):
        loader(processor, source(root), pairs, probabilities="sqrt_size")
    with pytest.raises(ValueError, match="needs equal 'probabilities'"):
        DataConfig(sources=[source(root)], probabilities="sqrt_size", fix_sampling_ratio=True)
    with pytest.raises(ConfigError, match="probabilities"):
        make_config({"sources": [], "probabilities": "size"}, DataConfig)
    replayed = replace(pairs, replay=True)
    made = loader(processor, source(root), replayed, probabilities="sqrt_size", replay_share=0.5)
    assert made.config.probabilities == [pytest.approx(COUNT**0.5)]
