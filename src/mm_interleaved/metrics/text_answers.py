"""Scores of short answers about texts and charts: ANLS, relaxed accuracy and exact match.

- `ANLS`: Biten et al., ICCV 2019, section 4.3 (arXiv 1905.13648), with the rules of the evaluation server: ST-VQA,
  DocVQA, InfographicVQA, EST-VQA.
- `RELAXED_ACCURACY`: Methani et al. (PlotQA, WACV 2020), as ChartQA uses it (arXiv 2203.10244, section 5.1).
- `EXACT_MATCH`: OCR-VQA (Mishra et al., ICDAR 2019) and DVQA (arXiv 1801.08163).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from .result import MetricResult, aligned, reports_missing

THRESHOLD = 0.5  # normalised distance from which on an answer is wrong
TOLERANCE = 0.05  # relative error of a number that is still right


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the least number of insertions, deletions and substitutions of characters."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row = row, [i]
        for j, right in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (left != right)))
    return row[-1]


def _plain(text: str) -> str:
    """The text in lower case, with single spaces."""
    return " ".join(text.lower().split())


def similarity(prediction: str, answer: str) -> float:
    """Normalised Levenshtein similarity, in [0, 1]: 1 - distance / length of the longer text; 0 if it is at most 0.5.

    Case does not count, and a run of white space is one space.
    """
    said, right = _plain(prediction), _plain(answer)
    distance = edit_distance(said, right) / max(len(said), len(right), 1)
    return 1 - distance if distance < THRESHOLD else 0.0


def _number(text: str) -> float | None:
    """The number that a text states; a percentage is divided by 100. None: it states none."""
    stated = text.strip()
    try:
        value = float(stated.removesuffix("%")) / (100 if stated.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def same(prediction: str, answer: str) -> float:
    """1 if the texts are the same but for case and white space, else 0."""
    return float(_plain(prediction) == _plain(answer))


def identical(prediction: str, answer: str) -> float:
    """1 if the texts are the same, else 0."""
    return float(prediction == answer)


def nearly(prediction: str, answer: str) -> float:
    """1 if the answer is right within the tolerance, else 0.

    Numbers may differ by 5 % of the right one. Other texts, and all texts if the right number is 0, must be `same`.
    """
    said, right = _number(prediction), _number(answer)
    if said is None or not right:
        return same(prediction, answer)
    return float(abs(said - right) <= TOLERANCE * abs(right))


@dataclass(frozen=True)
class AnswerMetric:
    """Mean scores in percent of generated texts against one or several right answers, of which the best counts.

    Attributes:
        rules: for each value of the result, by name, the score of a text for one answer, in [0, 1].
    """

    rules: Mapping[str, Callable[[str, str], float]]

    @reports_missing
    def __call__(
        self, predictions: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]]
    ) -> MetricResult:
        """Score generated texts.

        Raises:
            ValueError: the ids differ, or a sample has no answer.
        """
        rows = aligned(predictions, references)
        for key, _, answers in rows:
            if isinstance(answers, str) or not answers:
                raise ValueError(f"sample {key!r}: the reference must be a list of answers, not {answers!r}")
        return MetricResult.of_means({
            name: {key: 100 * max(rule(text, answer) for answer in answers) for key, text, answers in rows}
            for name, rule in self.rules.items()
        })  # fmt: skip


ANLS = AnswerMetric({"anls": similarity, "accuracy": same})
RELAXED_ACCURACY = AnswerMetric({"relaxed_accuracy": nearly, "accuracy": same})
EXACT_MATCH = AnswerMetric({"accuracy": identical, "accuracy_uncased": same})
