"""The interface of metrics, and confidence intervals over samples."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np

P = TypeVar("P")
R = TypeVar("R")
M = TypeVar("M", bound="Callable[..., MetricResult]")
SHOWN = 3  # ids that a message lists
Scores = dict[Hashable, float]
"""A number for each sample, by the sample's id."""


@dataclass(frozen=True)
class MetricResult:
    """The result of a metric.

    Attributes:
        values: the values by name, the main one first, in the units of papers: fractions in percent, BLEU and CIDEr
            times 100, similarities in [-1, 1], distances unchanged. Empty if nothing could be computed.
        per_sample: for every value that is a mean over samples, the score of each sample, by the value's name; in the
            same unit. Values of whole sets (BLEU, FID, mIoU) are not in it. Galleries rank samples by the first name.
        weights: for values that are weighted means, the weight of each sample, by the value's name. With `a / b` as
            scores and `b` as weights the mean is the ratio of the sums of `a` and `b`.
        skipped: why the metric could not be computed; None if it could.
        fix: a command or setting that makes it possible.

    Raises:
        ValueError: `per_sample` has a name that is not in `values`, or a weight has no score.
    """

    values: dict[str, float] = field(default_factory=dict)
    per_sample: dict[str, Scores] = field(default_factory=dict)
    weights: dict[str, Scores] = field(default_factory=dict)
    skipped: str | None = None
    fix: str | None = None

    def __post_init__(self) -> None:
        if unknown := self.per_sample.keys() - self.values.keys():
            raise ValueError(f"'per_sample' has scores of {sorted(unknown)}, but 'values' has {list(self.values)}")
        for name, weights in self.weights.items():
            if weights.keys() != self.per_sample.get(name, {}).keys():
                raise ValueError(f"'weights' and 'per_sample' of '{name}' must be of the same samples")

    @classmethod
    def of_means(
        cls,
        per_sample: Mapping[str, Scores],
        weights: Mapping[str, Scores] | None = None,
        others: Mapping[str, float] | None = None,
    ) -> MetricResult:
        """The result whose values are means of samples' scores.

        Args:
            per_sample: the scores by the value's name; a name without samples has no value.
            weights: the weights by the value's name; without weights all samples count the same.
            others: other values.
        """
        scores = {name: dict(found) for name, found in per_sample.items() if found}
        weights = {name: dict(found) for name, found in (weights or {}).items() if name in scores}
        values = {
            name: float(
                np.average(list(found.values()), weights=list(weights[name].values()) if name in weights else None)
            )
            for name, found in scores.items()
        }
        return cls(values | dict(others or {}), scores, weights)

    def grouped(self, group: Callable[[Hashable], Hashable]) -> MetricResult:
        """The same values, with the scores of several keys (such as the images of a story) combined.

        Args:
            group: returns the id of the sample that a key of `per_sample` belongs to.
        """
        scores: dict[str, Scores] = {}
        weights: dict[str, Scores] = {}
        for name, found in self.per_sample.items():
            sums, totals = defaultdict(float), defaultdict(float)
            for key, score in found.items():
                weight = self.weights[name][key] if name in self.weights else 1.0
                sums[group(key)] += score * weight
                totals[group(key)] += weight
            scores[name] = {key: total and sums[key] / total for key, total in totals.items()}
            weights[name] = dict(totals)
        return replace(self, per_sample=scores, weights=weights)


class Metric(Protocol):
    """Anything that can be called with predictions and references, both by the sample's id."""

    def __call__(self, predictions: Mapping[Hashable, Any], references: Mapping[Hashable, Any], /) -> MetricResult:
        """Score the predictions. Ids must agree; see `aligned`."""
        ...


class MissingRequirement(Exception):
    """A metric needs something that the package does not install: a program, a package, a file of weights.

    Attributes:
        reason: what is missing.
        fix: a command or setting that provides it.
    """

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}; {fix}")
        self.reason, self.fix = reason, fix


def gives(*names: str) -> Callable[[M], M]:
    """Declare the names of a metric's values, so that settings which name one are checked before anything runs.

    Args:
        *names: the names of all values that it can give, without those of parts, which have a "/".
    """

    def declare(metric: M) -> M:
        metric.__dict__["value_names"] = names
        return metric

    return declare


def value_names(metric: Callable[..., MetricResult]) -> tuple[str, ...] | None:
    """The names that a metric declares with `gives`; None: it does not say."""
    return getattr(metric, "value_names", None)


def reports_missing(compute: Callable[..., MetricResult]) -> Callable[..., MetricResult]:
    """Turn a `MissingRequirement` in a metric into a skipped result, so that other metrics still run."""

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
