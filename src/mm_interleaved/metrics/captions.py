"""BLEU-4, CIDEr-D and METEOR of captions through pycocoevalcap; approximations, so named, where it cannot run."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import ngrams
from .result import MetricResult, MissingRequirement, aligned, percent, reports_missing

INSTALL_PACKAGE = "pip install 'mm-interleaved[eval]'"
INSTALL_JAVA = "install Java, on Debian with: sudo apt-get install default-jre-headless"
Tokenized = dict[str, list[str]]  # pycocoevalcap's form: sample to sentences, tokens joined by spaces


def first_sentence(text: str) -> str:
    """What precedes the first full stop, without space around: the release's rule for COCO captions."""
    return text.partition(".")[0].strip()


@dataclass(frozen=True)
class CaptionMetrics:
    """Scores of captions (text by id) against reference captions (a sequence of texts by id).

    Values: `bleu_4`, `cider` and, if asked for, `meteor`, times 100. Without Java or pycocoevalcap `skipped` says
    what is missing, and there are `bleu_4_approximate` and `cider_approximate`, from a simpler tokenizer. The
    samples' scores are CIDEr.

    Attributes:
        first_sentence_only: cut captions at the first full stop.
        meteor: METEOR as well; it needs a gigabyte of memory.
    """

    first_sentence_only: bool = False
    meteor: bool = False

    @reports_missing
    def __call__(
        self, predictions: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]]
    ) -> MetricResult:
        """Score captions.

        Raises:
            ValueError: the ids differ, or a sample has no reference.
        """
        rows = aligned(predictions, references)
        if missing := [key for key, _, captions in rows if not any(caption.strip() for caption in captions)]:
            raise ValueError(f"sample {missing[0]!r} has no reference caption ({len(missing)} such samples)")
        texts = [[first_sentence(text) if self.first_sentence_only else text] for _, text, _ in rows]
        others = [list(captions) for _, _, captions in rows]
        try:
            written, wanted = penn_treebank(texts), penn_treebank(others)
        except MissingRequirement as missing_part:
            values, per_sample = _approximate(texts, others)
            names = "bleu_4, cider and meteor" if self.meteor else "bleu_4 and cider"
            return MetricResult(values, per_sample, f"{names}: {missing_part.reason}", missing_part.fix)
        return self._exact(written, wanted)

    def _exact(self, written: Tokenized, wanted: Tokenized) -> MetricResult:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider

        bleu, _ = Bleu(ngrams.ORDERS).compute_score(wanted, written, verbose=0)
        _, cider = Cider().compute_score(wanted, written)
        values = {"bleu_4": 100 * float(bleu[-1]), "cider": percent(cider)}
        per_sample = [100 * float(score) for score in cider]
        if not self.meteor:
            return MetricResult(values, per_sample)
        try:
            values["meteor"] = 100 * _meteor(written, wanted)
        except MissingRequirement as missing:
            return MetricResult(values, per_sample, f"meteor: {missing.reason}", missing.fix)
        return MetricResult(values, per_sample)


def _approximate(texts: list[list[str]], others: list[list[str]]) -> tuple[dict[str, float], list[float]]:
    """Values and CIDEr of each sample, without Java."""
    hypotheses = [ngrams.simple_tokens(text) for (text,) in texts]
    references = [[ngrams.simple_tokens(text) for text in captions] for captions in others]
    cider = [100 * score for score in ngrams.cider_d(hypotheses, references)]
    bleu = 100 * ngrams.bleu(hypotheses, references)[-1]
    return {"bleu_4_approximate": bleu, "cider_approximate": sum(cider) / len(cider)}, cider


def require_java() -> None:
    """Check that what pycocoevalcap needs is there.

    Raises:
        MissingRequirement: the package or Java is missing, or the package's folder, where its tokenizer writes, is
            read-only.
    """
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise MissingRequirement("the package pycocoevalcap is not installed", INSTALL_PACKAGE)
    if shutil.which("java") is None:
        raise MissingRequirement("there is no java command", INSTALL_JAVA)
    folder = Path(next(iter(found.submodule_search_locations))) / "tokenizer"
    if not os.access(folder, os.W_OK):
        raise MissingRequirement(
            f"{folder} cannot be written to, and its tokenizer must",
            f"give the user the right to write there, or install it anew: {INSTALL_PACKAGE}",
        )


def penn_treebank(sentences: Sequence[Sequence[str]]) -> Tokenized:
    """Tokens of sentences by the Penn Treebank tokenizer, lower-cased, without punctuation.

    Args:
        sentences: of each sample.

    Returns:
        The sample's number to its sentences, tokens joined by spaces.

    Raises:
        MissingRequirement: as `require_java`, or Java does not run the tokenizer.
    """
    require_java()
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # A line is a sentence for it: no other line ends, no blank lines, and no separator of METEOR's.
    plain = [" ".join(text.replace("|||", " ").split()) for group in sentences for text in group]
    asked = {i: [{"caption": text}] for i, text in enumerate(plain) if text}
    tokens = PTBTokenizer().tokenize(asked) if asked else {}
    if len(tokens) < len(asked) or (asked and not any(line for (line,) in tokens.values())):
        raise MissingRequirement("java does not run pycocoevalcap's tokenizer", "see its message above; java -version")
    flat = iter([tokens[i][0] if i in tokens else "" for i in range(len(plain))])
    return {str(i): [next(flat) for _ in group] for i, group in enumerate(sentences)}


def _meteor(written: Tokenized, wanted: Tokenized) -> float:
    """METEOR 1.5 (Denkowski and Lavie, 2014) of the corpus, in [0, 1]."""
    from pycocoevalcap.meteor.meteor import Meteor

    try:
        score, _ = Meteor().compute_score(wanted, written)
    except (ValueError, OSError) as error:
        raise MissingRequirement(
            f"java does not run METEOR ({error})", "give it 2 GB of memory; java -version"
        ) from error
    return float(score)
