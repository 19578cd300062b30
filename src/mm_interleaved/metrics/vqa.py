"""Accuracy of short answers: VQAv2, OK-VQA, TextVQA and VizWiz with the official normalisation, and GQA.

The rules are those of the VQA challenge's evaluation (Antol et al., arXiv 1505.00468; Goyal et al., arXiv 1612.00837),
including their peculiarities, since all published values have them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

from .result import MetricResult, Scores, aligned, reports_missing

AGREED = 3  # an answer that this many annotators gave is fully right
PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
ARTICLES = ("a", "an", "the")
NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the official code passes a flag, whose value is 32, as the number of replacements
_REGULAR = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
    I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
    should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's
    there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've
    wouldn't y'all you'd you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """The official table of 120 contractions, from spellings without an apostrophe. Two of its rows are mistakes."""
    table = {word.replace("'", ""): word for word in _REGULAR.split()}
    for stem in ("couldn't", "hadn't", "mightn't", "shouldn't", "wouldn't"):
        table |= dict.fromkeys((stem.replace("'", "") + "'ve", stem + "ve"), stem + "'ve")
    for who in ("he", "it", "she", "someone", "something", "there", "they", "we", "who", "you", "somebody", "I"):
        table |= dict.fromkeys((f"{who}d've", f"{who}'dve"), f"{who}'d've")
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    table |= dict.fromkeys(("yall'll", "y'allll"), "y'all'll")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    return table | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()
_ASCII_WORDS = ("ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've")
_ASCII_KEYS = ("couldn'tve", "hadn'tve")
TYPOGRAPHIC = {
    key if key in _ASCII_KEYS else key.replace("'", "’"): word if word in _ASCII_WORDS else word.replace("'", "’")
    for key, word in CONTRACTIONS.items()
}
"""VizWiz's copy of the table, in which most apostrophes are typographic; these contractions match no reference."""


@dataclass(frozen=True)
class VQAReference:
    """The answers of annotators to a question.

    Attributes:
        answers: at least two answers; official files have ten.
        question_type: the first words of the question in VQAv2, or "".
        answer_type: "yes/no", "number" or "other" in VQAv2, or "".

    Raises:
        ValueError: fewer than two answers; each is compared with the others.
    """

    answers: tuple[str, ...]
    question_type: str = ""
    answer_type: str = ""

    def __post_init__(self) -> None:
        if len(self.answers) < 2:
            raise ValueError(f"a VQA reference needs two answers or more (the official files have ten): {self.answers}")


def process_punctuation(text: str) -> str:
    """The official rule: a mark that is next to a space anywhere is deleted, others become spaces; periods are deleted.

    If there is a comma within a number, every mark is deleted and not replaced. A period before a digit is kept.
    """
    deleting = bool(_COMMA_IN_NUMBER.search(text))
    out = text
    for mark in PUNCTUATION:
        delete = deleting or mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if delete else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def process_digit_article(text: str, *, typographic: bool = False) -> str:
    """The official rule: lower case, number words up to ten as digits, no articles, contractions with apostrophes.

    Args:
        text: an answer.
        typographic: whether to use VizWiz's apostrophes.
    """
    contractions = TYPOGRAPHIC if typographic else CONTRACTIONS
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=2**16)  # the same few thousand answers recur
def normalize(text: str, *, typographic: bool = False) -> str:
    """Both official rules, in their order."""
    return process_digit_article(process_punctuation(text), typographic=typographic)


def extract_answer(text: str) -> str:
    """The part of a generated text that the release scores as its answer: "The answer is a dog." gives "dog".

    Keeps what is before the first newline, then before the first ".", "," and "!"; in lower case; what follows "is",
    "are", "a", "an", "the"; what precedes "of", "or", "and". These are looked for within words and numbers too, so
    "pizza box" gives "box", "3.5" gives "3", and "black and white" gives "black": such answers are never right.
    """
    answer = text.replace('"', "").strip().partition("\n")[0]
    for mark in (".", ",", "!"):
        answer = answer.partition(mark)[0]
    answer = answer.lower()
    for word in ("is ", "are ", "a ", "an ", "the "):
        parts = answer.split(word)
        answer = parts[1] if len(parts) > 1 else answer
    for word in (" of", " or ", " and "):
        answer = answer.partition(word)[0]
    return answer.strip()


def _leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, number of others who agree / 3), in [0, 1]."""
    agree = [answer == prediction for answer in answers]
    total = sum(agree)
    return sum(min(1.0, (total - own) / AGREED) for own in agree) / len(answers)


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """Official accuracy of one extracted answer, in [0, 1].

    If all annotators gave exactly the same answer, strings are compared directly; otherwise both sides are normalised.
    """
    plain = [_one_line(answer) for answer in answers]
    prediction = _one_line(prediction)
    if len(set(plain)) > 1:
        plain, prediction = [normalize(answer) for answer in plain], normalize(prediction)
    return _leave_one_out(prediction, plain)


def vizwiz_score(prediction: str, answers: Sequence[str]) -> float:
    """VizWiz's accuracy of one extracted answer, in [0, 1]: only the prediction is normalised, and always."""
    return _leave_one_out(normalize(_one_line(prediction), typographic=True), answers)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@dataclass(frozen=True)
class VQAAccuracy:
    """VQA accuracy in percent of generated answers (text by id) against `VQAReference`s.

    Values: `accuracy`, the official one, of texts as they are; its mean for each answer type and question type that the
    references name; and `accuracy_compat`, the release's, of the part that `extract_answer` leaves of a text.

    Attributes:
        score: the rule for one answer; `vizwiz_score` for VizWiz, otherwise `vqa_score`.
    """

    score: Callable[[str, Sequence[str]], float] = vqa_score

    @reports_missing
    def __call__(
        self, predictions: Mapping[Hashable, str], references: Mapping[Hashable, VQAReference]
    ) -> MetricResult:
        """Score generated answers.

        Raises:
            ValueError: the ids differ.
        """
        scores: dict[str, Scores] = {"accuracy": {}, "accuracy_compat": {}}
        groups: dict[str, list[float]] = defaultdict(list)
        for key, text, reference in aligned(predictions, references):
            scores["accuracy"][key] = 100 * self.score(text, reference.answers)
            scores["accuracy_compat"][key] = 100 * self.score(extract_answer(text), reference.answers)
            for kind in ("answer_type", "question_type"):
                if name := getattr(reference, kind):
                    groups[f"accuracy/{kind}={name}"].append(scores["accuracy"][key])
        return MetricResult.of_means(scores, others={name: fmean(group) for name, group in sorted(groups.items())})


@reports_missing
def gqa_accuracy(predictions: Mapping[Hashable, str], references: Mapping[Hashable, str]) -> MetricResult:
    """Exact match in percent of generated texts with GQA's one answer.

    Values: `accuracy`, the official one, of texts as they are, in which case counts; and `accuracy_compat`, the
    release's, of the part that `extract_answer` leaves of a text.

    Raises:
        ValueError: the ids differ.
    """
    rows = aligned(predictions, references)
    exact = {key: 100.0 * (text == answer) for key, text, answer in rows}
    compat = {key: 100.0 * (extract_answer(text) == answer.strip().lower()) for key, text, answer in rows}
    return MetricResult.of_means({"accuracy": exact, "accuracy_compat": compat})
