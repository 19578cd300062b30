"""Ranking of candidate answers in VisDial: NDCG on dense relevance, and MRR, R@k and mean rank of the right answer.

Formulas: Das et al., arXiv 1611.08669, and the VisDial challenge's NDCG.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .result import MetricResult, Scores, aligned, reports_missing

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class DialogueReference:
    """The reference of one round: the relevance of candidates, the right candidate, or both.

    Attributes:
        relevance: of each candidate, at least 0, and above 0 for one or more; None: the round has no dense annotation.
        answer: number of the right candidate; None: unknown.

    Raises:
        ValueError: neither is given, a relevance is negative, or none is above 0 (NDCG is then undefined).
    """

    relevance: tuple[float, ...] | None = None
    answer: int | None = None

    def __post_init__(self) -> None:
        if self.relevance is None and self.answer is None:
            raise ValueError("a dialogue reference needs the relevance of its candidates, the right one, or both")
        if self.relevance is not None and (min(self.relevance, default=0) < 0 or not any(self.relevance)):
            raise ValueError("relevance must be 0 or more and above 0 for one candidate; otherwise NDCG is undefined")


def ranks(scores: Sequence[float]) -> np.ndarray:
    """Rank of each candidate, int64 [n]: 1 for the highest score; of equal scores the earlier candidate comes first."""
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    found = np.empty(len(order), dtype=np.int64)
    found[order] = np.arange(1, len(order) + 1)
    return found


def ndcg(scores: Sequence[float], relevance: Sequence[float]) -> float:
    """DCG of the k best-scored candidates over the best possible, k = how many have relevance above 0; in [0, 1]."""
    graded = np.asarray(relevance, dtype=np.float64)
    k = int(np.count_nonzero(graded))
    discounts = 1 / np.log2(np.arange(k) + 2)
    ranked = graded[np.argsort(ranks(scores))]
    return float((ranked[:k] * discounts).sum() / (np.sort(graded)[::-1][:k] * discounts).sum())


RANKINGS = ("ndcg", "mrr", "mean_rank", *(f"r@{k}" for k in RECALL_AT))  # the names of its values


@reports_missing
def dialogue_ranking(
    predictions: Mapping[Hashable, Sequence[float]], references: Mapping[Hashable, DialogueReference]
) -> MetricResult:
    """Score the candidates' scores (a list by id, higher is better) against `DialogueReference`s.

    Values: `ndcg`, `mrr` and `r@1`, `r@5`, `r@10` in percent, `mean_rank`; each over the rounds that have the required
    reference.

    Raises:
        ValueError: the ids differ, a score is not finite, or the number of scores is not that of candidates.
    """
    gains: Scores = {}
    places: Scores = {}
    for key, scores, reference in aligned(predictions, references):
        _check(key, scores, reference)
        if reference.relevance is not None:
            gains[key] = 100 * ndcg(scores, reference.relevance)
        if reference.answer is not None:
            places[key] = float(ranks(scores)[reference.answer])
    recalls = {f"r@{k}": {key: 100.0 * (place <= k) for key, place in places.items()} for k in RECALL_AT}
    reciprocal = {key: 100 / place for key, place in places.items()}
    return MetricResult.of_means({"ndcg": gains, "mrr": reciprocal, "mean_rank": places, **recalls})


def _check(key: Hashable, scores: Sequence[float], reference: DialogueReference) -> None:
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(f"sample {key!r}: a candidate's score is not a finite number")
    if reference.relevance is not None and len(reference.relevance) != len(scores):
        raise ValueError(
            f"sample {key!r}: {len(scores)} scores, but relevance of {len(reference.relevance)} candidates"
        )
    if reference.answer is not None and not 0 <= reference.answer < len(scores):
        raise ValueError(f"sample {key!r}: the right answer is number {reference.answer} of {len(scores)} candidates")
