"""Boxes in text, overlap, accuracy at one half."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.loss.loss_for_object_detection import box_iou

from mm_interleaved.metrics.grounding import NOWHERE, grounding_accuracy, iou, parse_box

corner, side = st.integers(0, 900), st.integers(1, 99)
boxes = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), corner, corner, side, side)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("(012,045)(678,999)</box>", (12, 45, 678, 999)),
        ("it is at <box>(1, 2)(3.5,4)</box>, (5,6)(7,8)", (1, 2, 3.5, 4)),
        ("(1,2)", NOWHERE),
        ("(1 2)(3 4)", NOWHERE),
        ("(1,2)(3,x)", NOWHERE),
        ("(nan,2)(3,4)", NOWHERE),
        ("(1,2) (3,4)", NOWHERE),
        ("((((", NOWHERE),
        ("", NOWHERE),
    ],
)
def test_parsing(text: str, box: tuple[float, ...]) -> None:
    assert parse_box(text) == box


@given(st.text("(),.0123456789 -einfa", max_size=30))
def test_any_text_gives_a_box(text: str) -> None:
    assert len(parse_box(text)) == 4


def test_overlap_by_hand() -> None:
    assert iou((0, 0, 4, 2), (2, 0, 6, 2)) == pytest.approx(4 / 12)
    assert iou((0, 0, 1, 1), (1, 1, 2, 2)) == 0
    assert iou((5, 5, 5, 9), (5, 5, 5, 9)) == 0
    assert iou((4, 4, 2, 2), (2, 2, 4, 4)) == 0  # corners the wrong way round


def test_overlap_is_that_of_transformers() -> None:
    """A thousand pairs, of which many overlap."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 40, (2, 1000, 2))
    pairs = torch.from_numpy(np.concatenate([corners, corners + rng.integers(1, 60, (2, 1000, 2))], -1)).float()
    theirs = box_iou(*pairs)[0].diag()
    ours = [iou(tuple(a), tuple(b)) for a, b in zip(*pairs.tolist(), strict=True)]
    assert sum(overlap > 0 for overlap in ours) > 500
    assert ours == pytest.approx(theirs.tolist(), abs=1e-6)


@given(boxes, boxes, st.integers(1, 9))
def test_overlap_is_symmetric_and_survives_scaling_of_an_axis(a, b, factor: int) -> None:
    overlap = iou(a, b)
    assert 0 <= overlap <= 1
    assert overlap == iou(b, a)
    assert iou(a, a) == 1
    wide = [(x1 * factor, y1, x2 * factor, y2) for x1, y1, x2, y2 in (a, b)]
    assert iou(*wide) == pytest.approx(overlap)


def test_exactly_one_half_counts_and_malformed_text_is_wrong() -> None:
    truth = (0, 0, 100, 100)
    texts = {1: "(0,0)(50,100)", 2: "(0,0)(49,100)", 3: "somewhere", 4: "(000,000)(100,100)"}
    result = grounding_accuracy(texts, dict.fromkeys(texts, truth))
    assert result.per_sample["accuracy"] == {1: 100, 2: 0, 3: 0, 4: 100}
    assert result.values == pytest.approx({"accuracy": 50, "mean_iou": 100 * (0.5 + 0.49 + 0 + 1) / 4, "unparsed": 25})


def test_a_reference_without_area_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'q': the reference's box"):
        grounding_accuracy({"q": ""}, {"q": (5, 5, 5, 9)})
