"""Ranking of candidates: by hand, against torchmetrics, and what must not change the score."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional import retrieval

from mm_interleaved.metrics.dialogue import DialogueReference, dialogue_ranking, ndcg, ranks


def test_ranks_by_hand() -> None:
    assert ranks([0.1, 0.9, 0.5, 0.9]).tolist() == [4, 1, 3, 2]


def test_ndcg_by_hand() -> None:
    # Three are relevant, so the three best-scored count: relevance 0, 1 and 0.5 in that order.
    scores, relevance = [4.0, 3.0, 2.0, 1.0], [0.0, 1.0, 0.5, 0.5]
    gained = 1 / math.log2(3) + 0.5 / 2
    best = 1 + 0.5 / math.log2(3) + 0.5 / 2
    assert ndcg(scores, relevance) == pytest.approx(gained / best)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(2, 100))
def test_ndcg_and_mrr_are_those_of_torchmetrics(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    scores = 1.0 + rng.permutation(count)  # theirs takes a score of 0 for "not retrieved"
    relevance = rng.integers(0, 3, count) / 2
    relevance[rng.integers(count)] = 1
    k = int((relevance > 0).sum())
    theirs = retrieval.retrieval_normalized_dcg(torch.tensor(scores), torch.tensor(relevance), top_k=k)
    assert ndcg(scores, relevance) == pytest.approx(float(theirs), abs=1e-6)
    answer = int(rng.integers(count))
    result = dialogue_ranking({0: scores}, {0: DialogueReference(answer=answer)})
    target = torch.arange(count) == answer
    theirs = retrieval.retrieval_reciprocal_rank(torch.tensor(scores), target)
    assert result.values["mrr"] == pytest.approx(100 * float(theirs), rel=1e-6)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(-9, 9), st.sampled_from([0.0, 0.5, 1.0])),
        min_size=1,
        max_size=12,
        unique_by=lambda row: row[0],
    ),
    st.randoms(),
)
def test_neither_order_nor_scale_of_the_scores_matters(rows: list[tuple[int, float]], random) -> None:
    rows[0] = (rows[0][0], 1.0)
    score = ndcg(*zip(*rows, strict=True))
    assert 0 <= score <= 1
    random.shuffle(rows)
    assert ndcg(*zip(*rows, strict=True)) == pytest.approx(score)
    assert ndcg([3 * s - 7 for s, _ in rows], [r for _, r in rows]) == pytest.approx(score)
    assert ndcg([r for _, r in rows], [r for _, r in rows]) == pytest.approx(1)


def test_all_figures_by_hand() -> None:
    predictions = {"a": list(range(20)), "b": list(range(20, 0, -1))}
    graded = tuple(float(i == 19) for i in range(20))
    references = {"a": DialogueReference(graded, answer=13), "b": DialogueReference(graded, answer=0)}
    result = dialogue_ranking(predictions, references)  # ranks of the right one: 7 and 1
    assert result.values == pytest.approx(
        {"ndcg": 50, "mrr": 100 * (1 / 7 + 1) / 2, "mean_rank": 4, "r@1": 50, "r@5": 50, "r@10": 100}
    )
    assert result.per_sample["ndcg"] == pytest.approx({"a": 100, "b": 0})
    assert result.per_sample["mean_rank"] == {"a": 7, "b": 1}


def test_rounds_without_relevance_have_the_sparse_figures() -> None:
    result = dialogue_ranking(
        {1: [1.0, 2.0], 2: [1.0, 2.0]}, {1: DialogueReference((1.0, 0.0), 0), 2: DialogueReference(answer=1)}
    )
    assert result.values["ndcg"] == 0
    assert result.values["mrr"] == 75
    assert result.per_sample["ndcg"] == {1: 0}
    assert result.per_sample["mrr"] == {1: 50, 2: 100}


@pytest.mark.parametrize(
    ("scores", "reference", "words"),
    [
        ([1.0, math.nan], DialogueReference(answer=0), "not a finite number"),
        ([1.0], DialogueReference((1.0, 0.0)), "1 scores, but relevance of 2"),
        ([1.0], DialogueReference(answer=1), "number 1 of 1"),
    ],
)
def test_bad_input_names_the_sample(scores: list[float], reference: DialogueReference, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        dialogue_ranking({"d7": scores}, {"d7": reference})
    assert "'d7'" in str(caught.value)


def test_bad_references() -> None:
    with pytest.raises(ValueError, match="undefined"):
        DialogueReference((0.0, 0.0))
    with pytest.raises(ValueError, match="the right one, or both"):
        DialogueReference()
