"""BLEU-4 and CIDEr-D of captions, computed by pycocoevalcap."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from .result import MetricResult, MissingRequirement, aligned, reports_missing

INSTALL_PACKAGE = "pip install 'mm-interleaved[eval]'"
INSTALL_JAVA = "install Java, on Debian with: sudo apt-get install default-jre-headless"
Tokenized = dict[str, list[str]]  # pycocoevalcap's format: sample to sentences, tokens joined by spaces


@reports_missing
def caption_scores(predictions: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]]) -> MetricResult:
    """Score captions (text by id) against reference captions (a sequence of texts by id).

    Values: `cider`, and `bleu_4` of the whole set, times 100. They need pycocoevalcap and Java.

    Raises:
        ValueError: the ids differ, or a sample has no reference.
    """
    rows = aligned(predictions, references)
    if missing := [key for key, _, captions in rows if not any(caption.strip() for caption in captions)]:
        raise ValueError(f"sample {missing[0]!r} has no reference caption ({len(missing)} such samples)")
    written, wanted = penn_treebank([[text] for _, text, _ in rows]), penn_treebank([others for _, _, others in rows])
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    bleu, _ = Bleu(4).compute_score(wanted, written, verbose=0)
    _, cider = Cider().compute_score(wanted, written)
    scores = {key: 100 * float(score) for (key, _, _), score in zip(rows, cider, strict=True)}
    return MetricResult.of_means({"cider": scores}, others={"bleu_4": 100 * float(bleu[-1])})


def require_java() -> None:
    """Check that pycocoevalcap and its requirements are installed.

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
        sentences: the sentences of each sample.

    Returns:
        The sample's number to its sentences, tokens joined by spaces.

    Raises:
        MissingRequirement: as `require_java`, or Java does not run the tokenizer.
    """
    require_java()
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The tokenizer treats each line as a sentence, so there must be no other line ends and no blank lines.
    plain = [" ".join(text.split()) for group in sentences for text in group]
    asked = {i: [{"caption": text}] for i, text in enumerate(plain) if text}
    tokens = PTBTokenizer().tokenize(asked) if asked else {}
    if len(tokens) < len(asked) or (asked and not any(line for (line,) in tokens.values())):
        raise MissingRequirement("java does not run pycocoevalcap's tokenizer", "see its message above; java -version")
    flat = iter([tokens[i][0] if i in tokens else "" for i in range(len(plain))])
    return {str(i): [next(flat) for _ in group] for i, group in enumerate(sentences)}
