"""Captions: stored results of pycocoevalcap, and what is said where it cannot run."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from mm_interleaved.metrics import MissingRequirement, captions
from mm_interleaved.metrics.captions import caption_scores

STORED = json.loads((Path(__file__).parent / "captions.json").read_text())
SAMPLES = STORED["samples"]
PREDICTIONS = {f"image {i}": sample["prediction"] for i, sample in enumerate(SAMPLES)}
REFERENCES = {f"image {i}": sample["references"] for i, sample in enumerate(SAMPLES)}
VALUES = {name: STORED["values"][name] for name in ("cider", "bleu_4")}
PER_SAMPLE = {f"image {i}": sample["cider"] for i, sample in enumerate(SAMPLES)}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for pycocoevalcap, which is not always installed."""
    folder = tmp_path / "pycocoevalcap"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "pycocoevalcap", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_scores_of_the_stored_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Java: the tokens are those that its tokenizer gave."""
    pytest.importorskip("pycocoevalcap")
    tokens = {text: sample["tokens"] for sample in SAMPLES for text in [sample["prediction"]]}
    tokens |= {t: k for s in SAMPLES for t, k in zip(s["references"], s["reference_tokens"], strict=True)}
    stored = lambda sentences: {str(i): [tokens[text] for text in group] for i, group in enumerate(sentences)}  # noqa: E731
    monkeypatch.setattr(captions, "penn_treebank", stored)
    result = caption_scores(dict(reversed(PREDICTIONS.items())), REFERENCES)
    assert result.values == pytest.approx(VALUES, rel=1e-9)
    assert result.per_sample == {"cider": pytest.approx(PER_SAMPLE, rel=1e-9)}


@pytest.mark.slow
def test_the_whole_with_java() -> None:
    try:
        captions.require_java()
    except MissingRequirement as missing:
        pytest.skip(str(missing))
    result = caption_scores(PREDICTIONS, REFERENCES)
    assert result.skipped is None
    assert result.values == pytest.approx(VALUES, rel=1e-6)
    assert result.per_sample == {"cider": pytest.approx(PER_SAMPLE, rel=1e-6)}


def varied_captions(count: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions with odd punctuation, cases, numbers and lengths, each with one to five references that vary them."""
    rng = random.Random(4711)
    words = [word for sample in SAMPLES for text in sample["references"] for word in text.split()]
    odd = ["don't", "U.S.", "-", "...", '"quoted"', "(left)", "20,000", "café", "A", "a/b", "it's", "&", "😀", "\n"]

    def say() -> str:
        found = [rng.choice(odd) if rng.random() < 0.08 else rng.choice(words) for _ in range(rng.randint(1, 18))]
        return " ".join(found) + rng.choice(["", ".", " .", "!", "?", ";"])

    def like(text: str) -> str:
        kept = [rng.choice(words) if rng.random() < 0.3 else word for word in text.split(" ") if rng.random() < 0.9]
        return " ".join(kept) or "nothing"

    predictions = {f"{i}": say() for i in range(count)}
    references = {key: [like(text) for _ in range(rng.randint(1, 5))] for key, text in predictions.items()}
    return predictions, references


@pytest.mark.slow
def test_varied_captions_have_the_values_of_the_official_tool() -> None:
    """1,200 captions through `COCOEvalCap`'s own steps: its tokenizer for each side, then its scorers."""
    try:
        captions.require_java()
    except MissingRequirement as missing:
        pytest.skip(str(missing))
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    predictions, references = varied_captions(1200)
    said = PTBTokenizer().tokenize({key: [{"caption": text}] for key, text in predictions.items()})
    wanted = PTBTokenizer().tokenize({k: [{"caption": text} for text in texts] for k, texts in references.items()})
    (cider, each), (bleu, _) = Cider().compute_score(wanted, said), Bleu(4).compute_score(wanted, said, verbose=0)
    result = caption_scores(predictions, references)
    assert result.values == pytest.approx({"cider": 100 * cider, "bleu_4": 100 * bleu[3]}, rel=1e-9)
    assert result.per_sample["cider"] == pytest.approx(
        {k: 100 * v for k, v in zip(wanted, each, strict=True)}, rel=1e-9
    )
    assert len(set(result.per_sample["cider"].values())) > 1000


def executable(folder: Path, script: str) -> Path:
    """A folder with a `java` that only does what the script says."""
    (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "java").chmod(0o755)
    return folder


class TestWhatIsMissing:
    def test_java(self, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        result = caption_scores(PREDICTIONS, REFERENCES)
        assert (result.values, result.per_sample, result.skipped) == ({}, {}, "there is no java command")
        assert "default-jre" in result.fix

    def test_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name, package=None: None)
        result = caption_scores(PREDICTIONS, REFERENCES)
        assert result.skipped == "the package pycocoevalcap is not installed"
        assert result.fix == "pip install 'mm-interleaved[eval]'"

    def test_the_right_to_write(self, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(executable(tmp_path, "exit 0")))
        (package / "tokenizer").rmdir()
        result = caption_scores(PREDICTIONS, REFERENCES)
        assert f"{package / 'tokenizer'} cannot be written to" in result.skipped

    def test_a_java_that_works(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("pycocoevalcap")
        monkeypatch.setenv("PATH", f"{executable(tmp_path, 'exit 1')}:/usr/bin:/bin")
        result = caption_scores(PREDICTIONS, REFERENCES)
        assert "java does not run" in result.skipped


def test_a_sample_without_references_is_named() -> None:
    with pytest.raises(ValueError, match="sample 'b' has no reference caption"):
        caption_scores({"a": "x", "b": "y"}, {"a": ["x"], "b": [" "]})
