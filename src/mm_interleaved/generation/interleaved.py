"""The interleaved generator: it takes documents with open slots and yields events while text and images are generated.

Documents of a batch take their turns together: first all texts, then all images. The rules are in `rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial

import PIL.Image
import torch

from ..document import Document
from ..model import MMInterleavedModel
from ..model.image_decoder import DenoisingStep
from ..processor import MMInterleavedProcessor
from ..processor.images import to_pil
from ..processor.packing import TokenStream
from .events import DocumentFinished, Event, ImageProgress, SegmentFinished, TextDelta
from .rows import DocumentRows, PreparedDocument, Turn
from .rules import WrittenText, end_tokens
from .settings import GenerationSettings
from .state import GenerationState
from .text import add_tokens, write, write_beams
from .workspace import uses_graphs

__all__ = [
    "DocumentFinished", "Event", "ImageProgress", "InterleavedGenerator", "PreparedDocument", "SegmentFinished",
    "TextDelta", "Turn",
]  # fmt: skip


class InterleavedGenerator(DocumentRows):
    """Runs a batch of documents. `rows` and `state` may be inspected between events.

    Args:
        model: the model.
        processor: turns documents into tokens and images into pixels.
        settings: settings; values that are None come from the model's configuration.
        progress: whether to yield an event for every denoising step.
    """

    def __init__(
        self,
        model: MMInterleavedModel,
        processor: MMInterleavedProcessor,
        settings: GenerationSettings,
        progress: bool = True,
    ) -> None:
        super().__init__(model, processor)
        self.make_state: Callable[..., GenerationState] = GenerationState
        self.progress = progress
        self.settings = replace(settings, image=model.image_decoder.settled(settings.image))

    def start(self, documents: Sequence[Document | PreparedDocument], seeds: Sequence[int] | None = None) -> None:
        """Start with these documents, without processing them yet.

        Args:
            documents: documents to fill and continue, prepared or not.
            seeds: for each document the seed of its texts and images; None: the seeds of the settings.

        Raises:
            InputError: a document cannot be used, or it is longer than the model's context.
            ValueError: images cannot be generated with these settings.
        """
        given = self.prepare_all(documents)
        seed, image_seed = self.settings.seed, self.settings.image.seed
        chosen = [(seed, image_seed)] * len(given) if seeds is None else [(s, s) for s in seeds]
        self.rows = [self._row(one, self.settings, *pair) for one, pair in zip(given, chosen, strict=True)]
        vars(self).pop("state", None)  # frees its memory before more is allocated
        self.state = self._new_state(given)

    def prepare_all(self, documents: Sequence[Document | PreparedDocument]) -> list[PreparedDocument]:
        """`prepare` several documents; those that are prepared already do not change.

        Raises:
            InputError: as in `prepare`.
            ValueError: images cannot be generated with these settings.
        """
        self.model.image_decoder.sampler(self.settings.image)
        return [
            document if isinstance(document, PreparedDocument) else self.prepare(document, f"document {index}")
            for index, document in enumerate(documents)
        ]

    def _new_state(self, given: Sequence[PreparedDocument]) -> GenerationState:
        """A state with capacity for the given parts of each document and for its images, as far as they are known."""
        images = [sum(len(x.images) if isinstance(x, TokenStream) else x == "image" for x in one.plan) for one in given]
        images = [count + row.goes_on for count, row in zip(images, self.rows, strict=True)]
        first = max((len(one.plan[0]) for one in given), default=0)
        tokens = first + self.settings.text.max_new_tokens + self.model.config.num_image_tokens
        return self.make_state(
            self.model, len(given), uses_graphs(self.model, self.settings.text.cache_implementation),
            tokens=min(tokens, self.limit), slots=min(max(images, default=0), self.most_images), images=sum(images),
        )  # fmt: skip

    def run(
        self, documents: Sequence[Document | PreparedDocument], seeds: Sequence[int] | None = None
    ) -> Iterator[Event]:
        """Fill and continue documents, as a stream of events.

        Args:
            documents: documents to fill and continue, prepared or not.
            seeds: as in `start`.

        Raises:
            InputError: a document cannot be used, or it is longer than the model's context.
            ValueError: images cannot be generated with these settings.
        """
        self.start(documents, seeds)
        size = self.settings.image.batch_size
        while any(row.reason is None for row in self.rows):
            yield from self._advance(self._unfinished())
            if writing := self._waiting_for("text"):
                yield from self._write(writing)
            yield from self._advance(self._unfinished())
            waiting = self._waiting_for("image")
            for begin in range(0, len(waiting), size):
                yield from self._generate_images(waiting[begin : begin + size])

    def _unfinished(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.reason is None]

    def _waiting_for(self, turn: Turn) -> list[int]:
        return [i for i in self._unfinished() if self.rows[i].next_turn == turn]

    def _write(self, chosen: list[int]) -> Iterator[Event]:
        start = list(self.state.lengths)
        limits = [self._most_tokens(row) for row in self.rows]
        if self.settings.text.num_beams > 1:
            best = write_beams(self.state, self.settings.text, self._only(chosen, limits), self.banned)
            texts = {index: best[index][0] for index in chosen}
        else:
            texts = yield from self._write_stream(chosen, limits)
        for index in chosen:
            yield from self._after_text(index, texts[index], start[index])

    @staticmethod
    def _only(chosen: Sequence[int], limits: Sequence[int]) -> list[int]:
        """`limits`, with 0 for all rows but `chosen`."""
        return [limit if index in chosen else 0 for index, limit in enumerate(limits)]

    def _write_stream(self, chosen: list[int], limits: list[int]) -> Generator[Event, None, dict[int, WrittenText]]:
        """Generate token by token; returns the texts by row."""
        texts = [WrittenText([]) for _ in self.rows]
        shown = [""] * len(self.rows)
        active = torch.tensor([i in chosen for i in range(len(self.rows))])
        generators = [row.generator for row in self.rows]
        limits = self._only(chosen, limits)
        for step in write(self.state, self.settings.text, generators, active, limits, self.banned):
            add_tokens(step, texts, end_tokens(self.model))
            for index in chosen:
                text = self.processor.decode_text(texts[index].ids)
                if len(text) > len(shown[index]) and not text.endswith("\ufffd"):  # not inside a multi-byte character
                    yield TextDelta(index, text[len(shown[index]) :])
                    shown[index] = text
        return {i: texts[i] for i in chosen}

    def _generate_images(self, chosen: list[int]) -> Iterator[Event]:
        self._announce(chosen)
        decoder, settings = self.model.image_decoder, self.settings.image
        with torch.no_grad():
            conditions = decoder.resampler(*self.state.image_context(chosen))
        earlier = self.state.earlier_images(chosen)
        candidates: list[list[PIL.Image.Image]] = [[] for _ in chosen]
        decode = partial(decoder.decode, half=True) if settings.decode_dtype == "bfloat16" else decoder.decode
        for number in range(settings.num_candidates):
            rows = [self.rows[i] for i in chosen]
            seeds = [row.noise_seed(number) for row in rows]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            step = None
            for step in decoder.denoise(conditions, earlier, settings, generators):
                if self.progress:
                    yield from _progress(chosen, number, step)
            assert step is not None  # there is at least one
            for images, values in zip(candidates, decode(step.latents), strict=True):
                images.append(to_pil(values.float().cpu().numpy()))
        pixels = self.processor.pixels([images[0] for images in candidates])
        for index, images, first in zip(chosen, candidates, pixels, strict=True):
            yield self._after_image(index, images, first)


def _progress(chosen: list[int], candidate: int, step: DenoisingStep) -> Iterator[Event]:
    for position, index in enumerate(chosen):
        preview = None if step.preview is None else to_pil(step.preview[position].float().cpu().numpy())
        yield ImageProgress(index, candidate, step.index, step.total, preview)
