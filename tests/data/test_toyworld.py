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

from .world import loader, texts


def toyworld(**options: Any) -> SourceConfig:
    defaults = {"documents": 6, "batch_size": 1, "max_length": 200, "keep_remainder": True, "options": {"size": 64}}
    return SourceConfig("toyworld", **{**defaults, **options})


def test_documents_are_drawn_anew_in_every_pass_and_alike_for_a_seed(processor: MMInterleavedProcessor) -> None:
    made = loader(processor, toyworld())
    epochs = [[text for batch in made for text in texts(processor, batch)] for _ in range(2)]
    assert all("".join(e).count("<s>") == 6 for e in epochs)
    assert epochs[0] != epochs[1]
    again = [text for batch in loader(processor, toyworld()) for text in texts(processor, batch)]
    assert again == epochs[0]


def test_ranks_and_workers_draw_different_documents(processor: MMInterleavedProcessor) -> None:
    parts = [loader(processor, toyworld(documents=12), rank=r, world_size=2, num_workers=2) for r in range(2)]
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
    batches = list(loader(processor, toyworld(options={"size": 64, "mix": mix})))
    rows = re.findall("<s>.*?</s>", "".join(text for b in batches for text in texts(processor, b)))
    assert len(rows) == 6
    assert all(row.count("[]") == 1 for row in rows)


def test_other_documents_come_first(processor: MMInterleavedProcessor) -> None:
    """Also when ranks and workers share the documents, and after each has been resumed."""
    only = {name: {form: float(form == name) for form in FORM_NAMES} for name in ("caption", "story")}
    options = {"size": 64, "mix": only["story"], "first": {"documents": 4, "objects": [1, 1], "mix": only["caption"]}}
    for ranks in (1, 2):
        found = []
        for rank in range(ranks):
            made = loader(processor, toyworld(documents=6, options=options), rank=rank, world_size=ranks)
            found += re.findall("<s>.*?</s>", "".join(text for b in made for text in texts(processor, b)))
        images = sorted(row.count("[]") for row in found)
        assert images[:4] == [1] * 4
        assert all(count > 1 for count in images[4:])


@pytest.mark.parametrize("first", [{}, {"objects": [1, 1]}])
def test_how_many_come_first_must_be_said(processor: MMInterleavedProcessor, first: dict[str, Any]) -> None:
    if first:
        with pytest.raises(DataError, match=r"options\.first needs 'documents'"):
            loader(processor, toyworld(options={"size": 64, "first": first}))
    else:
        loader(processor, toyworld(options={"size": 64, "first": first}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"size": 64, "objects": [2]}}, "unpack"),
        ({"options": {"size": 64, "objects": [0, 2]}}, "fewest and the most"),
        ({"options": {"size": 64, "first": {"documents": 3, "object": [1, 1]}}}, "object"),
        ({"options": {"sise": 64}}, "sise"),
        ({"options": {"mix": {"storys": 1}}}, "storys"),
        ({"options": {"size": 4}}, "size=4"),
        ({"split": "trian"}, "'split' must be one of train"),
    ],
)
def test_options_that_it_does_not_know(processor: MMInterleavedProcessor, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"source 'toyworld': the toy world refuses its options: .*{message}"):
        loader(processor, toyworld(**change))
