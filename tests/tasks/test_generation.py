"""Samples go into the model as they are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest

from mm_interleaved import MMInterleaved, MMInterleavedProcessor
from mm_interleaved.document import Image
from mm_interleaved.generation import DocumentFinished
from mm_interleaved.tasks import Task

BEGINNINGS = {"rounds": "all", "protocol": "autoregressive"}  # the second sample of each story has three turns


@pytest.mark.parametrize(("name", "options", "slots"), [("vqav2", {}, 1), ("ade20k", {}, 1), ("vist", BEGINNINGS, 2)])
def test_slots_are_filled(name: str, options: dict[str, str], slots: int, toy_task: Callable[..., Task],
                          model: MMInterleaved, processor: MMInterleavedProcessor) -> None:  # fmt: skip
    """As many as there are answers, of their kinds, and nothing else is made."""
    quick = {"num_inference_steps": 1, "num_candidates": 1, "max_new_tokens": 3, "num_beams": 1, "min_new_tokens": 1}
    task = toy_task(name, options=options, generation=quick)
    sample = list(islice(task.samples(), 2))[-1]
    assert sum(s.is_open for s in sample.document.segments) == slots
    *_, last = model.generate_interleaved(sample.document, processor, task.settings, progress=False)
    assert isinstance(last, DocumentFinished)
    before, after = sample.document.segments, last.result.segments
    assert [isinstance(s, Image) for s in after] == [isinstance(s, Image) for s in before]
    assert [a for a, b in zip(after, before, strict=True) if not b.is_open] == [b for b in before if not b.is_open]
    assert not any(s.is_open for s in after)
