"""What every metric takes and returns, and confidence intervals over its samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

P = TypeVar("P")
R = TypeVar("R")
SHOWN = 3  # ids that a message names


@dataclass(frozen=True)
class MetricResult:
    """What a metric found.

    Attributes:
        values: the figures by name, in the unit in which papers print them: shares in percent, BLEU and CIDEr times
            100, similarities in [-1, 1], distances as they are. Empty if nothing could be computed.
        per_sample: the metric's main figure for each sample, in the order of the references and in the same unit;
            None where there is no such thing (FID).
        skipped: what could not be computed, all or part of the metric, and why; None if nothing is missing.
        fix: the command or the setting that would mend it.
        ratios: of values that are ratios of sums, by name: for each sample, in the order of the references, what it
            adds above the line and below it.
    """

    values: dict[str, float] = field(default_factory=dict)
    per_sample: list[float] | None = None
    skipped: str | None = None
    fix: str | None = None
    ratios: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


class Metric(Protocol):
    """Anything that can be called with predictions and references, both by the sample's id."""

    def __call__(self, predictions: Mapping[Hashable, Any], references: Mapping[Hashable, Any], /) -> MetricResult:
        """Score the predictions. Ids must agree; see `aligned`."""
        ...


class MissingRequirement(Exception):
    """A metric lacks something that is not ours to fetch: a program, a package, a file of weights.

    Attributes:
        reason: what is missing.
        fix: the command or the setting that would mend it.
    """

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}; {fix}")
        self.reason, self.fix = reason, fix


def reports_missing(compute: Callable[..., MetricResult]) -> Callable[..., MetricResult]:
    """Turn a `MissingRequirement` inside a metric into a skipped result, so that the other metrics go on."""

    @functools.wraps(compute)
    def guarded(*args: Any, **kwargs: Any) -> MetricResult:
        try:
            return compute(*args, **kwargs)
        except MissingRequirement as missing:
            return MetricResult(skipped=missing.reason, fix=missing.fix)

    return guarded


def aligned(predictions: Mapping[Hashable, P], references: Mapping[Hashable, R]) -> list[tuple[Hashable, P, R]]:
    """Pair predictions with references: (id, prediction, reference) in the order of the references.

    Raises:
        MissingRequirement: there are no samples at all.
        ValueError: a sample has no prediction, or a prediction belongs to no sample.
    """
    if not predictions and not references:
        raise MissingRequirement("there are no samples to score", "check the task's files and its sample limit")
    for ids, others, problem in (
        (references, predictions, "have no prediction"),
        (predictions, references, "have a prediction but no reference"),
    ):
        odd = [key for key in ids if key not in others]
        if odd:
            named = ", ".join(repr(key) for key in odd[:SHOWN]) + (", ..." if len(odd) > SHOWN else "")
            raise ValueError(
                f"{len(odd)} of {len(ids)} samples {problem}: {named}; "
                "predictions and references must come from the same task and split"
            )
    return [(key, predictions[key], reference) for key, reference in references.items()]


def percent(values: Sequence[float] | np.ndarray) -> float:
    """Mean of shares in [0, 1], times 100."""
    return 100 * float(np.mean(values))


def confidence_interval(
    scores: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13).

    Args:
        scores: a score for each sample.
        weights: how much each sample counts, at least 0; with `a / b` as scores and `b` as weights the mean is the
            ratio of the sums of `a` and of `b`. Not given, all count the same.
        seed: of the resampling; the same seed gives the same interval.
        resamples: how many samples of the same size are drawn with replacement.
        level: share of the resampled means that lies within.

    Returns:
        Lower and upper bound, in the unit of the scores.

    Raises:
        ValueError: there are no scores, no weight is above 0, or the level is not between 0 and 1.
    """
    if not len(scores):
        raise ValueError("a confidence interval needs at least one score")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    values = np.asarray(scores, dtype=np.float64)
    counts = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if not counts.any():
        raise ValueError("a confidence interval needs at least one score that counts")
    products, rng = values * counts, np.random.default_rng(seed)
    means = []
    while len(means) < resamples:
        drawn = rng.integers(len(values), size=len(values))
        if total := counts[drawn].sum():  # else nothing was drawn that counts
            means.append(products[drawn].sum() / total)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
