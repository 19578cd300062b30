"""Converts the questions of evaluation harnesses to documents and settings, and answers them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from ..document import Document, Image, Segment, Text
from ..evaluation.predict import sample_seed
from ..generation import DocumentFinished, InterleavedGenerator
from ..generation.settings import GenerationSettings, TextSettings
from ..pretrained import Loaded
from ..processor.tokenizer import encode_plain

PLACEHOLDER = re.compile(r"\s*<image(?:[ _]?\d+)?>\s*")
STYLES = ("plain", "vqa", "chat")
log = logging.getLogger(__name__)
ImageSource = PIL.Image.Image | str | Path


def to_document(context: str, images: Sequence[ImageSource], style: str = "plain") -> Document:
    """A question as a document whose last segment is open.

    Args:
        context: the text. Images replace its `<image>` marks; those without a mark precede it.
        images: the images in order.
        style: "plain": the text only; "vqa": the original's prompt for questions; "chat": a conversation.

    Raises:
        ValueError: the style is unknown, or the text has more `<image>` marks than there are images.
    """
    if style not in STYLES:
        raise ValueError(f"there is no style '{style}'; styles are {', '.join(STYLES)}")
    texts = PLACEHOLDER.split(context)
    places = len(texts) - 1
    if places > len(images):
        raise ValueError(f"the question has {places} places for images, but {len(images)} images: {context[:80]}")
    waiting = [Image(image, supervise=False) for image in images]
    segments: list[Segment] = [*waiting[: len(waiting) - places]]
    placed = waiting[len(waiting) - places :]
    for index, text in enumerate(texts):
        segments += [placed[index - 1]] if index else []
        segments += [Text(text, supervise=False)] if text.strip() else []
    if style == "vqa":
        segments = [Text("Based on the image, please answer the question.", supervise=False), *segments,
                    Text("The answer is:", supervise=False)]  # fmt: skip
    if style == "chat":
        return Document([replace(s, role="user") for s in segments] + [Text(role="assistant")])
    return Document([*segments, Text()])


def to_settings(arguments: Mapping[str, Any]) -> TextSettings:
    """Convert a harness's generation arguments: greedy, unless it requests beams or sampling with a temperature.

    Unknown arguments are ignored: tasks have some for other models.
    """
    temperature, beams = float(arguments.get("temperature") or 0), arguments.get("num_beams") or 1
    length_penalty = arguments.get("length_penalty")
    sampling = bool(arguments.get("do_sample")) and temperature > 0 and beams == 1
    return TextSettings(
        max_new_tokens=arguments.get("max_new_tokens") or 128, min_new_tokens=0, num_beams=beams,
        do_sample=sampling, temperature=temperature if sampling else 1.0,
        top_p=(arguments.get("top_p") or 1.0) if sampling else 1.0, top_k=0,
        length_penalty=1.0 if length_penalty is None else length_penalty,
    )  # fmt: skip


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of some strings."""
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.split(stop)[0] if stop else text
    return text.strip()


class Answerer:
    """Answers batches of questions.

    Args:
        loaded: the model and its processor.
        batch_size: number of questions in a batch.
        seed: seed of sampling; each question has its own seed derived from it.
    """

    def __init__(self, loaded: Loaded, batch_size: int = 1, seed: int = 0) -> None:
        self.model, self.processor = loaded.model, loaded.processor
        self.batch_size, self.seed = batch_size, seed

    def write(self, documents: Sequence[Document], settings: TextSettings, ids: Sequence[str]) -> Iterator[str]:
        """Answers to documents that end in an open text, in their order.

        A document that fills the model's context gets an empty answer, and a warning.

        Raises:
            InputError: a document cannot be used, or exceeds the model's context; the message has its id.
        """
        generator = InterleavedGenerator(self.model, self.processor, GenerationSettings(settings), progress=False)
        for begin in range(0, len(documents), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            seeds = [sample_seed(self.seed, "answer", name) for name in ids[part]]
            named = [replace(document, id=name) for document, name in zip(documents[part], ids[part], strict=True)]
            ends = [e for e in generator.run(named, seeds) if isinstance(e, DocumentFinished)]
            for event in sorted(ends, key=lambda e: e.document):
                answers = [s.text or "" for s in event.result.generated if isinstance(s, Text)]
                if not answers:
                    log.warning("%s ended by '%s' before an answer, which is empty", event.result.name, event.reason)
                yield answers[-1] if answers else ""

    @torch.no_grad()
    def score(self, documents: Sequence[Document], texts: Sequence[str]) -> Iterator[tuple[float, bool]]:
        """Log-probability of each text after its document, and whether greedy search would generate it."""
        for begin in range(0, len(documents), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            prompts = [self._prompt(document) for document in documents[part]]
            batch = self.processor(prompts, padding_side="left").to(self.model.compute_device)
            options = [encode_plain(self.processor.tokenizer, text) for text in texts[part]]
            longest = max(len(ids) for ids in options)
            greedy = self.model.generate_text(batch, TextSettings(longest, 0, num_beams=1))
            scores = self.model.score(batch, [[ids] for ids in options], self.batch_size)
            for (written,), (score,), ids in zip(greedy, scores, options, strict=True):
                yield score, written.all_ids[: len(ids)] == ids

    def _prompt(self, document: Document) -> Document:
        rendered = [segment for segment in self.processor.render(document) if not segment.is_open]
        return Document(rendered)
