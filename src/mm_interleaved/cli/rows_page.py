"""The page of `mmi finetune --check`: the first rows as the model gets them, what is trained, and what is left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
from jinja2 import Environment, PackageLoader

from ..data import DataReport
from ..data.report import COUNTS
from ..data.sheet import END, Piece, row_pieces
from ..metrics.grounding import SCALE, parse_boxes
from ..processor import Batch, MMInterleavedProcessor
from .report import image_url

ROWS = 6  # rows of a source on the page


@dataclass(frozen=True)
class SourceSample:
    """The first batches of one source.

    Attributes:
        name: name of the source.
        about: its settings in a few words.
        batches: the batches.
        report: what was read and left out for them.
        problem: the error that ended reading; "": none.
        statistics: values by name.
    """

    name: str
    about: str
    batches: Sequence[Batch]
    report: DataReport
    problem: str
    statistics: dict[str, str]


@dataclass(frozen=True)
class RowsPage:
    """The content of the page.

    Attributes:
        title: the recipe.
        facts: further values by name, for the head of the page.
        warnings: what should be seen first.
        sources: the first batches of each source.
        trained: parameters by part: name, number, number of trained ones.
        memory: estimated memory by part; empty: unknown.
        settings: all settings, as YAML.
    """

    title: str
    facts: dict[str, str]
    warnings: Sequence[str]
    sources: Sequence[SourceSample]
    trained: Sequence[tuple[str, int, int]]
    settings: str
    memory: dict[str, str] = field(default_factory=dict)

    def render(self, processor: MMInterleavedProcessor) -> str:
        """The page as HTML with all images inline; text in it is escaped."""
        environment = Environment(loader=PackageLoader("mm_interleaved.cli"), autoescape=True)
        sources = [{"sample": sample, "rows": _rows(sample.batches, processor), "counts": _counts(sample)}
                   for sample in self.sources]  # fmt: skip
        return environment.get_template("rows.html").render(page=self, sources=sources)


def _counts(sample: SourceSample) -> dict[str, Any]:
    report = sample.report
    counts, examples = report.counts(sample.name), report.examples(sample.name)
    return {
        "read": {what: f"{counts[what]:,}" for what in COUNTS if what in counts} | sample.statistics,
        "left_out": [
            (reason, number, examples[reason])
            for reason, number in sorted(report.rejected(sample.name).items(), key=lambda item: -item[1])
        ],
    }


def _rows(batches: Sequence[Batch], processor: MMInterleavedProcessor) -> list[dict[str, Any]]:
    rows = []
    for batch in batches:
        for row in range(len(batch.input_ids)):
            if len(rows) == ROWS:
                return rows
            tokens = int(batch.attention_mask[row].sum())
            learned = int((batch.labels[row] != -100).sum())
            padding = batch.input_ids.shape[1] - tokens
            samples = [_sample(pieces) for pieces in _split(row_pieces(batch, row, processor))]
            title = f"{tokens} tokens, {learned} with a loss, {padding} of padding, {len(samples)} samples"
            rows.append({"title": title, "samples": samples})
    return rows


def _split(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """The pieces of each document. The first one may be the rest of a document of the row before."""
    samples: list[list[Piece]] = [[]]
    for piece in pieces:
        if piece.content is None:
            samples.append([])
        samples[-1].append(piece)
    return [sample for sample in samples if sample]


def _sample(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The parts of a document.

    Boxes that are only written in its texts, so that their image is unknown, are drawn if the document has one image.
    """
    parts: list[dict[str, Any]] = []
    images = [piece for piece in pieces if isinstance(piece.content, PIL.Image.Image)]
    text = "".join(piece.content for piece in pieces if isinstance(piece.content, str) and piece.content != END)
    found = parse_boxes(text) if len(images) == 1 else []
    written = [tuple(side / SCALE for side in sides) for sides in found]
    for piece in pieces:
        content = piece.content
        if isinstance(content, PIL.Image.Image):
            known = [(number, box.sides) for number, box in piece.boxes]
            boxes = [_place(sides, number) for number, sides in known or enumerate(written, 1)]
            parts.append({"url": image_url(content), "learned": piece.learned, "boxes": boxes})
        elif content == END:
            parts.append({"end": END, "learned": piece.learned})
        elif content is not None:
            parts.append({"text": content, "learned": piece.learned})
    return {"parts": parts, "continued": pieces[0].content is not None}


def _place(sides: Sequence[float], number: int) -> dict[str, str | int]:
    """A box in percent of the image; `sides` are shares of it."""
    x1, y1, x2, y2 = (round(100 * side, 2) for side in sides)
    return {"style": f"left:{x1}%;top:{y1}%;width:{x2 - x1:.2f}%;height:{y2 - y1:.2f}%", "number": number}
