"""Captions: by hand, against stored results of pycocoevalcap, against the package itself, and without it."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_interleaved.metrics import MissingRequirement, captions
from mm_interleaved.metrics.captions import CaptionMetrics, first_sentence
from mm_interleaved.metrics.ngrams import bleu, cider_d, simple_tokens

STORED = json.loads((Path(__file__).parent / "captions.json").read_text())
SAMPLES = STORED["samples"]
PREDICTIONS = {i: sample["prediction"] for i, sample in enumerate(SAMPLES)}
REFERENCES = {i: sample["references"] for i, sample in enumerate(SAMPLES)}
sentence = st.lists(st.sampled_from(["a", "cat", "dog", "on", "the", "mat"]), max_size=8)
samples = st.lists(st.tuples(sentence, st.lists(sentence.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=6)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for pycocoevalcap, which is not always installed."""
    folder = tmp_path / "pycocoevalcap"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "pycocoevalcap", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.fixture
def no_java(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


@pytest.fixture
def java() -> None:
    """What the exact scores need."""
    try:
        captions.require_java()
    except MissingRequirement as missing:
        pytest.skip(str(missing))


def test_first_sentence() -> None:
    assert first_sentence(" A cat. A dog.") == "A cat"
    assert first_sentence("a cat") == "a cat"


class TestByHand:
    def test_bleu(self) -> None:
        # Of 5 words 4 are right, of 4 bigrams "the cat" twice; the reference has 6 words, so exp(1 - 6/5).
        scores = bleu([["the", "cat", "the", "cat", "sat"]], [[["the", "cat", "and", "the", "cat", "x"]]])
        brevity = math.exp(1 - 6 / 5)
        assert scores[0] == pytest.approx(brevity * 4 / 5, rel=1e-6)
        assert scores[1] == pytest.approx(brevity * math.sqrt(4 / 5 * 2 / 4), rel=1e-6)

    def test_cider(self) -> None:
        # Two images without a word in common: every n-gram weighs log 2 times its count.
        references = [[["a", "b"]], [["c", "d"]]]
        assert cider_d([["a", "b"], ["c", "x"]], references) == pytest.approx([10 * 2 / 4, 10 * 0.5 / 4])

    def test_cider_clips_and_punishes_length(self) -> None:
        # "a a a a" against "a b": min(4, 1) * 1 over norms 4 and sqrt 2; no bigram in common; 3 bigrams against 1.
        scores = cider_d([["a"] * 4, ["z"]], [[["a", "b"]], [["z"]]])
        assert scores[0] == pytest.approx(10 / 4 / (4 * math.sqrt(2)) * math.exp(-(2**2) / 72))

    @pytest.mark.parametrize(
        ("text", "tokens"),
        [
            ("He doesn't see the dog's bone.", "he does n't see the dog 's bone"),
            ("A well-known (old) man, 3:45 p.m.!", "a well-known -lrb- old -rrb- man 3:45 p.m."),
            ('$3.50; "red" & blue', "$ 3.50 red & blue"),
            ("the letter G. A U.S. man", "the letter g. a u.s. man"),
            (" \n ", ""),
        ],
    )
    def test_tokens(self, text: str, tokens: str) -> None:
        assert " ".join(simple_tokens(text)) == tokens


class TestStoredResults:
    def test_same_tokens_same_scores(self) -> None:
        hypotheses = [sample["tokens"].split() for sample in SAMPLES]
        references = [[text.split() for text in sample["reference_tokens"]] for sample in SAMPLES]
        assert 100 * bleu(hypotheses, references)[3] == pytest.approx(STORED["values"]["bleu_4"], rel=1e-9)
        expected = [sample["cider"] for sample in SAMPLES]
        assert [100 * s for s in cider_d(hypotheses, references)] == pytest.approx(expected, rel=1e-9)

    def test_the_simple_tokenizer_is_near(self) -> None:
        raw = [text for sample in SAMPLES for text in (sample["prediction"], *sample["references"])]
        tokens = [text for sample in SAMPLES for text in (sample["tokens"], *sample["reference_tokens"])]
        assert [" ".join(simple_tokens(text)) for text in raw] == tokens

    @pytest.mark.slow
    def test_the_whole_with_java(self, java: None) -> None:
        result = CaptionMetrics(meteor=True)(PREDICTIONS, REFERENCES)
        assert result.skipped is None
        assert result.values == pytest.approx(STORED["values"], rel=1e-6)
        assert result.per_sample == pytest.approx([sample["cider"] for sample in SAMPLES])


@settings(max_examples=40)
@given(samples)
def test_same_scores_as_the_package_on_any_tokens(rows: list) -> None:
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    theirs = pytest.importorskip("pycocoevalcap.bleu.bleu")
    hypotheses, references = [list(column) for column in zip(*rows, strict=True)]
    res = {i: [" ".join(tokens)] for i, tokens in enumerate(hypotheses)}
    gts = {i: [" ".join(tokens) for tokens in group] for i, group in enumerate(references)}
    assert bleu(hypotheses, references) == pytest.approx(theirs.Bleu(4).compute_score(gts, res, verbose=0)[0], rel=1e-9)
    expected = cider.Cider().compute_score(gts, res)[1]
    np.testing.assert_allclose(cider_d(hypotheses, references), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=40)
@given(samples, st.randoms(use_true_random=False))
def test_ranges_and_orders(rows: list, random) -> None:
    hypotheses, references = zip(*rows, strict=True)
    scores = cider_d(hypotheses, references)
    assert all(-1e-9 <= score <= 10 + 1e-9 for score in scores)
    assert all(0 <= score <= 1 for score in bleu(hypotheses, references))
    order = list(range(len(rows)))
    random.shuffle(order)
    mixed = [rows[i] for i in order]
    assert cider_d(*zip(*mixed, strict=True)) == pytest.approx([scores[i] for i in order])
    assert bleu(*zip(*mixed, strict=True)) == pytest.approx(bleu(hypotheses, references))
    doubled = [list(group) * 2 for group in references]
    assert cider_d(hypotheses, doubled) == pytest.approx(scores)  # a reference given twice changes nothing
    assert bleu(hypotheses, doubled) == pytest.approx(bleu(hypotheses, references))


def executable(folder: Path, script: str) -> Path:
    """A folder with a `java` that only does what the script says."""
    (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "java").chmod(0o755)
    return folder


class TestWithoutJava:
    def test_it_is_said_and_approximated_under_other_names(self, no_java: None) -> None:
        assert shutil.which("java") is None
        result = CaptionMetrics(meteor=True)(PREDICTIONS, REFERENCES)
        assert result.skipped == "bleu_4, cider and meteor: there is no java command"
        assert "default-jre" in result.fix
        assert set(result.values) == {"bleu_4_approximate", "cider_approximate"}
        assert result.values["cider_approximate"] == pytest.approx(STORED["values"]["cider"], rel=0.02)
        assert len(result.per_sample) == len(SAMPLES)

    def test_a_missing_package_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name, package=None: None)
        result = CaptionMetrics()(PREDICTIONS, REFERENCES)
        assert result.skipped == "bleu_4 and cider: the package pycocoevalcap is not installed"
        assert result.fix == "pip install 'mm-interleaved[eval]'"

    def test_a_folder_that_cannot_be_written_is_said(
        self, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(executable(tmp_path, "exit 0")))
        (package / "tokenizer").rmdir()
        result = CaptionMetrics()(PREDICTIONS, REFERENCES)
        assert f"{package / 'tokenizer'} cannot be written to" in result.skipped

    def test_a_java_that_fails_is_said(self, java: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", f"{executable(tmp_path, 'exit 1')}:/usr/bin:/bin")
        result = CaptionMetrics()(PREDICTIONS, REFERENCES)
        assert "java does not run" in result.skipped
        assert "cider_approximate" in result.values


def test_cut_at_the_first_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name, package=None: None)
    references = {1: ["a cat sleeps"], 2: ["a dog runs"]}
    predictions = {1: "A cat sleeps. It is red and small.", 2: "a dog runs"}
    cut = CaptionMetrics(first_sentence_only=True)(predictions, references)
    whole = CaptionMetrics()(predictions, references)
    assert cut.per_sample[0] == pytest.approx(750)  # three of four orders of n-grams are there
    assert whole.per_sample[0] < 500


def test_a_sample_without_references_is_named() -> None:
    with pytest.raises(ValueError, match="sample 'b' has no reference caption"):
        CaptionMetrics()({"a": "x", "b": "y"}, {"a": ["x"], "b": [" "]})
