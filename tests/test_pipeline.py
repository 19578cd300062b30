"""The pipeline: inputs of every form, callbacks, interruption."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mm_interleaved import Document, Image, InputError, MMInterleaved, MMInterleavedProcessor, Text
from mm_interleaved.pipeline import MMInterleavedPipeline

from .conftest import make_image

FEW: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 1, "num_inference_steps": 3, "seed": 5}


@pytest.fixture
def pipe(model: MMInterleaved, processor: MMInterleavedProcessor) -> MMInterleavedPipeline:
    return MMInterleavedPipeline(model, processor)


def test_parts_are_a_document(pipe: MMInterleavedPipeline) -> None:
    parts = ["a red house", make_image(1), "and", Image()]
    output = pipe(parts, **FEW)
    same = pipe(Document([Text("a red house"), Image(make_image(1)), Text("and"), Image()]), **FEW)
    assert output.reasons == ["slots"]
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(same.images[0]))
    assert output.texts == []


def test_several_documents_and_their_order(pipe: MMInterleavedPipeline) -> None:
    output = pipe([Document([Text("one"), Text()]), Document([Text("two"), Image(), Text()])], **FEW)
    assert [[type(part) is str for part in parts] for parts in output.generated] == [[True], [False, True]]


def test_steps_are_called_back_and_can_interrupt(pipe: MMInterleavedPipeline) -> None:
    seen = []

    def callback(pipe: MMInterleavedPipeline, step: int, total: int, values: dict[str, Any]) -> None:
        seen.append((step, total, values["document"], values["preview"] is None))
        pipe.interrupt = step == 2

    output = pipe([Text("draw"), Image(), Text("and"), Image()], callback_on_step_end=callback, preview_every=2, **FEW)
    assert seen == [(1, 3, 0, True), (2, 3, 0, False)]
    assert output.reasons == ["interrupted"]
    assert output.generated == [[]]
    assert pipe(["draw", Image()], **FEW).reasons == ["slots"]


def test_a_stream_has_the_events(pipe: MMInterleavedPipeline) -> None:
    names = [type(event).__name__ for event in pipe.stream(["draw", Image()], **FEW)]
    assert names == ["ImageProgress"] * 3 + ["SegmentFinished", "DocumentFinished"]


def test_what_is_no_part(pipe: MMInterleavedPipeline) -> None:
    with pytest.raises(InputError, match=r"inputs\[1\].*not int"):
        pipe(["a", 3])
    with pytest.raises(ValueError, match=r"unknown setting .sed.\. Did you mean .seed."):
        pipe("a", sed=3)


def test_by_name() -> None:
    pipe = MMInterleavedPipeline.from_pretrained("debug")
    assert len(pipe("a", max_turns=1, max_new_tokens=2, min_new_tokens=2, do_sample=False, seed=1).texts) == 1
