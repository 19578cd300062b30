"""ANLS, relaxed accuracy and exact match, on cases computed by hand from the published definitions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_interleaved.metrics.text_answers import (
    ANLS,
    EXACT_MATCH,
    RELAXED_ACCURACY,
    edit_distance,
    nearly,
    similarity,
)

TEXTS = st.text("ab 1%.", max_size=8)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("saturday", "sunday", 3), ("", "abc", 3), ("abc", "abc", 0), ("ca", "abc", 3)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@given(TEXTS, TEXTS, TEXTS)
def test_edit_distance_is_a_distance(a: str, b: str, c: str) -> None:
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Coca Cola", "coca  cola", 1.0),  # neither case nor the width of spaces counts
        ("cocacola", "coca cola", 8 / 9),  # but a space does
        ("kitten", "sitting", 4 / 7),  # 3 / 7 is below the threshold
        ("ab", "ax", 0.0),  # 1 / 2 is not
        ("abcd", "abxx", 0.0),
        ("abcde", "abcxx", 0.6),
        ("", "", 1.0),
        ("", "a", 0.0),
    ],
)
def test_similarity(prediction: str, answer: str, score: float) -> None:
    assert similarity(prediction, answer) == pytest.approx(score)


def test_anls_takes_the_best_answer_and_the_mean_over_questions() -> None:
    result = ANLS({"1": "kitten", "2": "Pepsi"}, {"1": ["sitting", "mitten"], "2": ["coke", "pepsi"]})
    assert result.per_sample["anls"] == {"1": pytest.approx(100 * 5 / 6), "2": 100.0}
    assert result.values == {"anls": pytest.approx(50 * (5 / 6 + 1)), "accuracy": 50.0}


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("105", "100", True),  # exactly 5 %
        ("95", "100", True),
        ("105.1", "100", False),
        ("-105", "-100", True),
        ("100", "-100", False),
        ("50%", "0.5", True),
        ("52%", "50%", True),
        ("50", "50%", False),  # a percentage is a hundredth
        ("0", "0", True),
        ("0.0", "0", False),  # 5 % of nothing is nothing, so texts are compared
        ("Blue", "blue", True),
        ("blue", "blues", False),
        ("2014", "2010", True),  # years are numbers as well
        ("about 100", "100", False),
        ("nan", "nan", True),
        ("inf", "100", False),
    ],
)
def test_numbers_may_be_off_by_five_percent(prediction: str, answer: str, right: bool) -> None:
    assert nearly(prediction, answer) == right


def test_relaxed_accuracy() -> None:
    result = RELAXED_ACCURACY({"1": "98", "2": "red", "3": "10"}, {"1": ["100"], "2": ["Red"], "3": ["20"]})
    assert result.values == {"relaxed_accuracy": pytest.approx(200 / 3), "accuracy": pytest.approx(100 / 3)}


def test_exact_match() -> None:
    result = EXACT_MATCH({"1": "Yes", "2": "no"}, {"1": ["Yes"], "2": ["No"]})
    assert result.values == {"accuracy": 50.0, "accuracy_uncased": 100.0}


@pytest.mark.parametrize("answers", [[], "yes"])
def test_a_reference_is_a_list_of_answers(answers: object) -> None:
    with pytest.raises(ValueError, match="must be a list of answers"):
        EXACT_MATCH({"1": "yes"}, {"1": answers})  # type: ignore[dict-item]
