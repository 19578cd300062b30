"""The toy world as a source."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

from mm_interleaved.data import DataError, SourceConfig
from mm_interleaved.processor import MMInterleavedProcessor
from toyworld.documents import FORM_NAMES

from ..data.world import loader, texts


def toyworld(options: dict[str, Any] | None = None, **settings: Any) -> SourceConfig:
    defaults = {"batch_size": 1, "max_length": 200, "keep_remainder": True}
    own = {"documents": 6, "size": 64, **(options or {})}
    return SourceConfig("toyworld", options=own, **{**defaults, **settings})


def test_documents_are_drawn_anew_in_every_pass_and_alike_for_a_seed(processor: MMInterleavedProcessor) -> None:
    made = loader(processor, toyworld())
    epochs = [[text for batch in made for text in texts(processor, batch)] for _ in range(2)]
    assert all("".join(e).count("<s>") == 6 for e in epochs)
    assert epochs[0] != epochs[1]
    again = [text for batch in loader(processor, toyworld()) for text in texts(processor, batch)]
    assert again == epochs[0]


def test_ranks_and_workers_draw_different_documents(processor: MMInterleavedProcessor) -> None:
    parts = [loader(processor, toyworld({"documents": 12}), rank=r, world_size=2, num_workers=2) for r in range(2)]
    rows = [text for part in parts for batch in part for text in texts(processor, batch)]
    documents = re.findall("<s>.*?</s>", "".join(rows))
    assert len(documents) == 12
    assert len(set(documents)) > 8
    assert sum(p.report().counts("toyworld")["documents"] for p in parts) == 12


def test_going_on(processor: MMInterleavedProcessor) -> None:
    source = toyworld(max_length=60, keep_remainder=False)
    unbroken = list(itertools.islice(loader(processor, source, sampling="forever"), 9))
    first = loader(processor, source, sampling="forever")
    list(itertools.islice(first, 4))
    second = loader(processor, source, sampling="forever")
    second.load_state_dict(first.state_dict())
    for expected, batch in zip(unbroken[4:], second, strict=False):
        assert all(torch.equal(expected[k], batch[k]) for k in expected)


def test_forms_are_chosen(processor: MMInterleavedProcessor) -> None:
    mix = {"rest": 0, "caption": 1}
    batches = list(loader(processor, toyworld({"mix": mix})))
    rows = re.findall("<s>.*?</s>", "".join(text for b in batches for text in texts(processor, b)))
    assert len(rows) == 6
    assert all(row.count("[]") == 1 for row in rows)


def test_other_documents_come_first(processor: MMInterleavedProcessor) -> None:
    """Also when ranks and workers share the documents, and after each has been resumed."""
    only = {name: {form: float(form == name) for form in FORM_NAMES} for name in ("caption", "story")}
    options = {"mix": only["story"], "first": {"documents": 4, "objects": [1, 1], "mix": only["caption"]}}
    for ranks in (1, 2):
        found = []
        for rank in range(ranks):
            made = loader(processor, toyworld(options), rank=rank, world_size=ranks)
            found += re.findall("<s>.*?</s>", "".join(text for b in made for text in texts(processor, b)))
        images = sorted(row.count("[]") for row in found)
        assert images[:4] == [1] * 4
        assert all(count > 1 for count in images[4:])


def test_how_many_come_first_must_be_said(processor: MMInterleavedProcessor) -> None:
    with pytest.raises(DataError, match=r"first\.documents must be given \(source 'toyworld', options\)"):
        loader(processor, toyworld({"first": {"objects": [1, 1]}}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objects": [0, 2]}, "fewest and the most"),
        ({"mix": {"storys": 1}}, "storys"),
        ({"size": 4}, "size=4"),
    ],
)
def test_options_that_it_refuses(processor: MMInterleavedProcessor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"source 'toyworld': the toy world refuses its options: .*{message}"):
        loader(processor, toyworld(options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sise": 64}, r"unknown key 'sise' .*Did you mean 'size'"),
        ({"first": {"documents": 3, "sise": 64}}, r"unknown key 'sise' in first .*Did you mean 'size'"),
        ({"objects": [2]}, "objects"),
        ({"split": "trian"}, "split must be 'train', 'val' or 'test', not 'trian'.*Did you mean 'train'"),
    ],
)
def test_options_that_it_does_not_know(
    processor: MMInterleavedProcessor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as raised:
        loader(processor, toyworld(options))
    assert "source 'toyworld', options" in str(raised.value)
