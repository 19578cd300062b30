"""The protocol: pairing by id, skipped results, bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_interleaved.metrics import MetricResult, MissingRequirement, aligned, confidence_interval, reports_missing
from mm_interleaved.metrics.captions import caption_scores
from mm_interleaved.metrics.clip import CLIP, ImageSimilarity, TextSimilarity
from mm_interleaved.metrics.dialogue import dialogue_ranking
from mm_interleaved.metrics.grounding import grounding_accuracy
from mm_interleaved.metrics.images import FID
from mm_interleaved.metrics.segmentation import MeanIoU, SegmentedMeanIoU, Segmenter
from mm_interleaved.metrics.vqa import VQAAccuracy, gqa_accuracy
from toyworld.metrics import SceneImages, caption_facts

METRICS = [
    caption_scores, VQAAccuracy(), gqa_accuracy, dialogue_ranking, grounding_accuracy, MeanIoU(), FID(),
    SegmentedMeanIoU(Segmenter(None)), ImageSimilarity(CLIP(None)), TextSimilarity(CLIP(None)), SceneImages(),
    caption_facts,
]  # fmt: skip


def test_pairs_come_in_the_order_of_the_references() -> None:
    assert aligned({"b": 2, "a": 1}, {"a": "x", "b": "y"}) == [("a", 1, "x"), ("b", 2, "y")]


def test_a_sample_without_its_other_half_is_named() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 samples have no prediction: 'b'"):
        aligned({"a": 1}, {"a": 1, "b": 2})
    with pytest.raises(ValueError, match=r"4 of 5 samples have a prediction but no reference: 1, 2, 3, \.\.\."):
        aligned(dict.fromkeys(range(5)), {0: 1})


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: getattr(metric, "__name__", type(metric).__name__))
def test_nothing_to_score_is_said_by_every_metric(metric) -> None:
    result = metric({}, {})
    assert result.skipped == "there are no samples to score"
    assert (result.values, result.per_sample) == ({}, {})
    assert result.fix


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: getattr(metric, "__name__", type(metric).__name__))
def test_every_metric_names_a_missing_prediction(metric) -> None:
    with pytest.raises(ValueError, match="'lost'"):
        metric({}, {"lost": None})


def test_what_is_missing_becomes_a_result_and_other_errors_stay_errors() -> None:
    @reports_missing
    def metric(error: Exception) -> MetricResult:
        raise error

    assert metric(MissingRequirement("no weights", "fetch them")) == MetricResult(
        skipped="no weights", fix="fetch them"
    )
    with pytest.raises(KeyError):
        metric(KeyError("a"))


class TestMeans:
    def test_values_are_the_means_of_their_scores(self) -> None:
        result = MetricResult.of_means({"a": {1: 0.0, 2: 50.0}, "none": {}}, others={"corpus": 3.0})
        assert result.values == {"a": 25.0, "corpus": 3.0}
        assert result.per_sample == {"a": {1: 0.0, 2: 50.0}}

    def test_with_weights_they_are_ratios_of_sums(self) -> None:
        result = MetricResult.of_means({"a": {1: 100.0, 2: 50.0}, "b": {1: 1.0}}, {"a": {1: 1.0, 2: 4.0}})
        assert result.values == {"a": 60.0, "b": 1.0}

    def test_scores_of_one_sample_are_put_together(self) -> None:
        scores = {"a": {("x", 0): 100.0, ("x", 1): 0.0, ("y", 0): 30.0}, "b": {("x", 0): 7.0, ("y", 0): 1.0}}
        result = MetricResult.of_means(scores, {"a": {("x", 0): 3.0, ("x", 1): 1.0, ("y", 0): 0.0}})
        grouped = result.grouped(lambda key: key[0])
        assert grouped.values == result.values
        assert grouped.per_sample == {"a": {"x": 75.0, "y": 0.0}, "b": {"x": 7.0, "y": 1.0}}
        assert grouped.weights == {"a": {"x": 4.0, "y": 0.0}, "b": {"x": 1.0, "y": 1.0}}
        assert MetricResult.of_means(grouped.per_sample, grouped.weights).values == grouped.values

    def test_scores_without_a_value_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"scores of \['b'\], but 'values' has \['a'\]"):
            MetricResult({"a": 1.0}, {"b": {1: 1.0}})
        with pytest.raises(ValueError, match="'weights' and 'per_sample' of 'a'"):
            MetricResult({"a": 1.0}, {"a": {1: 1.0}}, {"a": {2: 1.0}})


class TestConfidenceInterval:
    @settings(max_examples=30)
    @given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.integers(0, 1000))
    def test_it_lies_within_the_scores_and_repeats_with_its_seed(self, scores: list[float], seed: int) -> None:
        low, high = confidence_interval(scores, seed=seed, resamples=50)
        slack = 1e-9 * max(scores)
        assert min(scores) - slack <= low <= high <= max(scores) + slack
        assert (low, high) == confidence_interval(scores, seed=seed, resamples=50)

    def test_it_has_the_width_of_the_normal_one(self) -> None:
        scores = np.random.default_rng(3).normal(50, 10, 400)
        low, high = confidence_interval(scores)
        error = scores.std() / 20
        assert low == pytest.approx(scores.mean() - 1.96 * error, abs=0.2)
        assert high == pytest.approx(scores.mean() + 1.96 * error, abs=0.2)
        narrow = confidence_interval(scores, level=0.5)
        assert low < narrow[0] < narrow[1] < high

    def test_weights_make_it_that_of_a_ratio_of_sums(self) -> None:
        rng = np.random.default_rng(4)
        below = rng.integers(1, 6, 400).astype(float)
        above = rng.binomial(below.astype(int), 0.7).astype(float)
        low, high = confidence_interval(above / below, weights=below)
        ratio = above.sum() / below.sum()
        error = np.sqrt(((above - ratio * below) ** 2).mean() / 400) / below.mean()  # Cochran 1977, eq. 6.13
        assert low == pytest.approx(ratio - 1.96 * error, abs=0.005)
        assert high == pytest.approx(ratio + 1.96 * error, abs=0.005)
        assert confidence_interval([1.0, 0.5], weights=[2, 2]) == confidence_interval([1.0, 0.5])

    def test_what_has_no_weight_counts_nothing(self) -> None:
        assert confidence_interval([0.25, 9.0], weights=[3, 0]) == (0.25, 0.25)

    def test_it_leaves_the_global_generator_alone(self) -> None:
        before = np.random.get_state()[1].copy()
        confidence_interval([1.0, 2.0])
        assert (np.random.get_state()[1] == before).all()

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="at least one score"):
            confidence_interval([])
        with pytest.raises(ValueError, match="that counts"):
            confidence_interval([1.0], weights=[0])
        with pytest.raises(ValueError, match="between 0 and 1"):
            confidence_interval([1.0], level=95)
