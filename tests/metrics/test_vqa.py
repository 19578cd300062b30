"""VQA accuracy: the official normalisation with its oddities, extraction in both forms, VizWiz and GQA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_interleaved.metrics.vqa import (
    CONTRACTIONS,
    TYPOGRAPHIC,
    VQAAccuracy,
    VQAReference,
    extract_answer,
    gqa_accuracy,
    normalize,
    process_digit_article,
    process_punctuation,
    vizwiz_score,
    vqa_score,
)

words = st.text("ab cthe'.,-3\n", max_size=20)


class TestNormalisation:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("red-and-blue", "red and blue"),  # a mark within words becomes a space
            ("red- and-blue", "red andblue"),  # the mark stands next to a space somewhere: it goes everywhere
            ("1,000-2", "10002"),  # a comma within a number: every mark goes
            ("what?", "what "),
            ("u.s.", "us"),
            ("3.5", "3.5"),
            (".5", ".5"),
            ("2.", "2"),
            ("it's", "it's"),
            ("a&b", "a&b"),
            ("." * 40 + "x", "." * 8 + "x"),  # only 32 are replaced
        ],
    )
    def test_punctuation(self, text: str, expected: str) -> None:
        assert process_punctuation(text) == expected

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("The  Dog", "dog"),
            ("an apple a day", "apple day"),
            ("None", "0"),
            ("zero one ten eleven", "0 1 10 eleven"),
            ("dont", "don't"),
            ("Im", "im"),  # the table has it with a capital, which no lower-cased word matches
            ("id its lets hell", "id its lets hell"),  # no such rows
            ("somebody'd", "somebodyd"),
            ("hed've", "he'd've"),
            ("the", ""),
        ],
    )
    def test_digits_articles_contractions(self, text: str, expected: str) -> None:
        assert process_digit_article(text) == expected

    def test_the_table_has_the_official_number_of_rows(self) -> None:
        assert len(CONTRACTIONS) == 120
        assert sum(key == word.replace("'", "") for key, word in CONTRACTIONS.items()) == 75
        rows = {"couldnt've": "couldn't've", "couldn'tve": "couldn't've", "Id've": "I'd've", "'ow'sat": "'ow's'at"}
        rows |= {"yall'll": "y'all'll", "y'alld've": "y'all'd've", "let's": "let's", "twas": "'twas"}
        assert CONTRACTIONS.items() >= rows.items()

    @given(words)
    def test_what_is_normal_stays_so_unless_marks_remain(self, text: str) -> None:
        once = normalize(text)
        assert once == once.lower().strip()
        assert not {"a", "an", "the"} & set(once.split())


class TestExtraction:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("The answer is a dog.", "dog"),
            ("Yes, it is", "yes"),
            ("2 or 3", "2"),
            ("teddy bear", "teddy bear"),
            ("a boy and a dog", "boy"),
            ("a man and a dog", "and"),  # "an " within "man "
            ("slice of pizza", "slice"),
            ('"Red"\nblue', "red"),
            ("pizza box", "box"),
            ("tennis racket", "racket"),
            ("coca cola", "cola"),
            ("post office", "post"),
            ("umbrella stand", "stand"),
            ("3.5", "3"),
            ("1,000 people.", "1"),
            ("12!", "12"),
            ("", ""),
        ],
    )
    def test_examples(self, text: str, answer: str) -> None:
        assert extract_answer(text) == answer

    @given(words)
    def test_one_line_in_lower_case_within_what_was_written(self, text: str) -> None:
        answer = extract_answer(text)
        assert answer in text.replace('"', "").lower()
        assert "\n" not in answer


def test_scores_are_those_of_the_official_evaluators() -> None:
    """1,500 answers of many forms: marks, numbers, articles, contractions, other scripts, references that all agree."""
    stored = json.loads((Path(__file__).parent / "vqa_official.json").read_text(encoding="utf-8"))
    texts = stored["texts"]
    rows = [(texts[text], [texts[i] for i in answers], *scores) for text, answers, *scores in stored["rows"]]
    ours = [(vqa_score(text, answers), vizwiz_score(text, answers)) for text, answers, _, _ in rows]
    wrong = [(row, found) for row, found in zip(rows, ours, strict=True) if found != pytest.approx(row[2:], abs=1e-6)]
    assert len(rows) == 1500
    assert wrong == []


class TestScores:
    @pytest.mark.parametrize(("agreeing", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
    def test_leave_one_out_by_hand(self, agreeing: int, expected: float) -> None:
        # Of three who agree, each is left out once: 3 times 2/3 and 7 times 1 make 0.9.
        answers = ["yes"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
        assert vqa_score("yes", answers) == pytest.approx(expected)
        assert vizwiz_score("yes", answers) == pytest.approx(expected)

    def test_answers_that_all_agree_are_compared_as_they_are(self) -> None:
        assert vqa_score("2", ["two"] * 10) == 0
        assert vqa_score("2", ["two"] * 9 + ["three"]) == 1
        assert vqa_score("two", [" two\n"] * 10) == 1

    def test_vizwiz_normalises_the_prediction_only(self) -> None:
        assert vizwiz_score("The dog", ["dog"] * 10) == 1
        assert vizwiz_score("dog", ["The dog"] * 10) == 0
        assert vizwiz_score("dont", ["don't"] * 10) == 0  # its table writes a typographic apostrophe
        assert TYPOGRAPHIC["dont"] == "don’t"
        assert vizwiz_score("cant", ["can't"] * 10) == 1  # but not in all of its rows

    @given(st.lists(st.sampled_from(["one", "1", "a cat", "cat", "dogs-"]), min_size=2, max_size=10), st.randoms())
    def test_range_and_order_of_the_people(self, answers: list[str], random) -> None:
        score = vqa_score("cat", answers)
        assert 0 <= score <= 1
        random.shuffle(answers)
        assert vqa_score("cat", answers) == pytest.approx(score)


class TestMetric:
    @pytest.mark.parametrize("answer", ["black and white", "slice of pizza", "red or blue", "pizza box", "3.5"])
    def test_nothing_is_cut_from_an_answer_by_the_official_rule(self, answer: str) -> None:
        """What ten people say is fully right, while the release's rule finds it wrong."""
        people = {1: VQAReference((answer,) * 10)}
        for values in (VQAAccuracy()({1: answer}, people).values, VQAAccuracy(vizwiz_score)({1: answer}, people).values,
                       gqa_accuracy({1: answer}, {1: answer}).values):  # fmt: skip
            assert list(values.items()) == [("accuracy", 100), ("accuracy_compat", 0)]

    def test_means_and_means_by_type(self) -> None:
        references = {
            1: VQAReference(("pizza box",) * 10, "what is", "other"),
            2: VQAReference(("yes",) * 10, "is the", "yes/no"),
        }
        result = VQAAccuracy()({2: "Yes.", 1: "pizza box"}, references)
        assert result.values == {
            "accuracy": 50, "accuracy_compat": 50, "accuracy/answer_type=other": 100,
            "accuracy/answer_type=yes/no": 0, "accuracy/question_type=is the": 0,
            "accuracy/question_type=what is": 100,
        }  # fmt: skip
        assert result.per_sample == {"accuracy": {1: 100, 2: 0}, "accuracy_compat": {1: 0, 2: 100}}

    def test_vizwiz_rule(self) -> None:
        references = {"a": VQAReference(("Unanswerable",) * 10)}
        predictions = {"a": "unanswerable"}
        assert VQAAccuracy(vizwiz_score)(predictions, references).values["accuracy"] == 0
        assert VQAAccuracy()(predictions, {"a": VQAReference(("unanswerable",) * 10)}).values["accuracy"] == 100

    def test_a_reference_of_one_answer_is_refused(self) -> None:
        with pytest.raises(ValueError, match="two answers or more"):
            VQAReference(("yes",))

    def test_gqa_is_exact(self) -> None:
        answers = {1: "tennis racket", 2: "dog", 3: "dog", 4: "racket"}
        texts = {1: "tennis racket", 2: "Dog", 3: "dogs", 4: "It is the Tennis racket."}
        result = gqa_accuracy(texts, answers)
        assert result.values == {"accuracy": 25, "accuracy_compat": 25}
        assert result.per_sample["accuracy"] == {1: 100, 2: 0, 3: 0, 4: 0}
        assert result.per_sample["accuracy_compat"] == {1: 0, 2: 100, 3: 0, 4: 0}
