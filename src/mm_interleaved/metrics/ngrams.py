"""BLEU and CIDEr-D in plain Python, to the letter of their formulas.

They give pycocoevalcap's figures on the same tokens, and are used where its tokenizer cannot run.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

ORDERS = 4  # of n-grams
SIGMA = 6.0  # of CIDEr-D's length penalty, in words
_SMALL, _TINY = 1e-9, 1e-15  # pycocoevalcap's, so that a BLEU without matches is about zero and never a division by it
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_TOKEN = re.compile(
    r"n't|'(?:s|re|ve|ll|d|m)\b|-[lr][rsc]b-"
    r"|(?<!\w)(?:(?:[^\W\d_]\.){2,}|[^\W\d_]\.(?=\s*\S))"  # "u.s.", an initial that does not end the text
    r"|\d+[:.,]\d+|\w+(?:[-./,'’&]\w+)*|[^\w\s]"
)
_BRACKETS = str.maketrans(
    {"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "}
)
_DROPPED = frozenset("'\"`.?!,:-;")


def simple_tokens(text: str) -> list[str]:
    """Words in lower case without punctuation, "don't" as "do n't": nearly what the Penn Treebank tokenizer gives.

    Brackets become "-lrb-" and the like and stay, as they do there, where only "-LRB-" is taken out.
    """
    split = _CLITIC.sub(r" \1", text.lower()).translate(_BRACKETS)
    return [token for token in _TOKEN.findall(split) if token not in _DROPPED]


def _counts(tokens: Sequence[str]) -> list[Counter[tuple[str, ...]]]:
    """How often each n-gram occurs, for n = 1 to 4."""
    return [Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)) for n in range(1, ORDERS + 1)]


def bleu(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus (Papineni et al., 2002), each in [0, 1], against the references closest in length.

    Args:
        hypotheses: tokens of each.
        references: for each hypothesis, tokens of its references.
    """
    right, guessed = [0] * ORDERS, [0] * ORDERS
    length = wanted = 0
    for tokens, others in zip(hypotheses, references, strict=True):
        most: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(ORDERS)]
        for other in others:
            most = [a | b for a, b in zip(most, _counts(other), strict=True)]
        for n, found in enumerate(_counts(tokens)):
            right[n] += (found & most[n]).total()
            guessed[n] += found.total()
        length += len(tokens)
        wanted += min((abs(len(other) - len(tokens)), len(other)) for other in others)[1]
    ratio = (length + _TINY) / (wanted + _SMALL)
    brevity = math.exp(min(0.0, 1 - 1 / ratio))
    scores, product = [], 1.0
    for n in range(ORDERS):
        product *= (right[n] + _TINY) / (guessed[n] + _SMALL)
        scores.append(brevity * product ** (1 / (n + 1)))
    return scores


def cider_d(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D (Vedantam et al., arXiv 1411.5726) of each hypothesis, in [0, 10]; the corpus score is their mean.

    An n-gram's weight is its count times log(images / images whose references have it). The score is the mean over
    n = 1 to 4 and over the references of the cosine between clipped weights, times exp(-difference in length² / 72).

    Args:
        hypotheses: tokens of each.
        references: for each hypothesis, tokens of its references.
    """
    counted = [[_counts(other) for other in others] for others in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for others in counted:
        frequency.update({gram for other in others for order in other for gram in order})
    images = math.log(max(len(references), 1))

    def weigh(counts: list[Counter[tuple[str, ...]]]) -> list[dict[tuple[str, ...], float]]:
        return [{g: c * (images - math.log(max(1, frequency[g]))) for g, c in order.items()} for order in counts]

    scores = []
    for tokens, others in zip(hypotheses, counted, strict=True):
        mine = _counts(tokens)
        weights = weigh(mine)
        similarities = [
            _similarity(weights, weigh(other)) * _length_penalty(mine[1].total() - other[1].total()) for other in others
        ]
        scores.append(10 * sum(similarities) / len(similarities))
    return scores


def _length_penalty(difference: int) -> float:
    """Of bigrams, as in pycocoevalcap: the difference in words, except that no words count as one."""
    return math.exp(-(difference**2) / (2 * SIGMA**2))


def _similarity(mine: list[dict[tuple[str, ...], float]], other: list[dict[tuple[str, ...], float]]) -> float:
    """Mean over n of the clipped cosine."""
    total = 0.0
    for a, b in zip(mine, other, strict=True):
        norms = math.sqrt(sum(w * w for w in a.values())) * math.sqrt(sum(w * w for w in b.values()))
        if norms:
            total += sum(min(w, b[gram]) * b[gram] for gram, w in a.items() if gram in b) / norms
    return total / ORDERS
