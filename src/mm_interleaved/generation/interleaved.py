"""The interleaved generator: documents with open slots go in, events come out while text and images are generated.

A document is read up to its first open slot, once. A text slot is filled until `</s>` or a begin-of-image token; an
image slot is filled from everything read so far, the image is read, and the document goes on. After the last slot a
document may go on by itself: text, and an image whenever the text asks for one. Documents of a batch take their turns
together: first all texts, then all images.

What a turn made is read when its document goes on, and not before: the last text or image of a document is never read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import PIL.Image
import torch

from ..document import ORIGINAL_TURNS, Document, DocumentError, Image, Segment, Text
from ..model import MMInterleavedModel
from ..model.image_decoder import DenoisingStep
from ..processor import MMInterleavedProcessor
from ..processor.images import to_picture
from ..processor.packing import TokenStream
from ..processor.tokenizer import IMAGE_TOKEN, SOI_TOKEN, encode_text
from .context import Context
from .settings import GenerationSettings
from .static import read_column, uses_static
from .static_pictures import eyes_of, read_images
from .text import WrittenText, add_tokens, end_tokens, write, write_beams

Turn = Literal["text", "image"]
CHAT_TURNS = 4  # most texts and pictures of an answer that does not end by itself


@dataclass
class TextDelta:
    """More text of a document's current slot."""

    document: int
    text: str


@dataclass
class ImageProgress:
    """One denoising step of a document's current picture; `preview` only when one was asked for."""

    document: int
    candidate: int
    step: int
    total: int
    preview: PIL.Image.Image | None = None


@dataclass
class SegmentFinished:
    """A text or a picture is finished.

    Attributes:
        document: number of the document in the batch.
        turn: which of the document's turns it was, from 0.
        segment: what was made.
        ids: for text, its tokens with the end token.
        candidates: for a picture, all candidates; the first is `segment.source`, which the document goes on from.
        replaced_by: the forced text that the document goes on from instead, if there was one.
    """

    document: int
    turn: int
    segment: Segment
    ids: list[int] = field(default_factory=list)
    candidates: list[PIL.Image.Image] = field(default_factory=list)
    replaced_by: str | None = None


@dataclass
class DocumentFinished:
    """A document is finished.

    Attributes:
        document: its number in the batch.
        result: the document with its slots filled and what was added.
        reason: `slots` (all filled), `eos`, `turns`, `segments`, `tokens`, `images` or `context` (no more room).
    """

    document: int
    result: Document
    reason: str


Event = TextDelta | ImageProgress | SegmentFinished | DocumentFinished


@dataclass(frozen=True)
class Prepared:
    """A document that was checked and turned into tokens.

    Attributes:
        document: as it was given.
        plan: its given stretches and open slots in turn; the first is always a stretch.
    """

    document: Document
    plan: Sequence[TokenStream | Turn]


@dataclass
class _Row:
    """One document on its way."""

    document: Document
    queue: deque[TokenStream | Turn]
    max_turns: int
    goes_on: bool  # whether it continues by itself after its last slot
    generator: torch.Generator
    image_seed: int
    ids: list[int] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    next_turn: Turn = "text"
    turns: int = 0
    made: list[Segment] = field(default_factory=list)
    tokens: int = 0
    reason: str | None = None

    def take_slot(self) -> None:
        """The slot that was just filled is no longer open."""
        if self.queue:
            self.queue.popleft()

    def result(self) -> Document:
        """The document with its slots filled and what came after them."""
        made, segments = deque(self.made), []
        for segment in self.document.segments:
            if not segment.is_open:
                segments.append(segment)
            elif made:
                segments.append(replace(made.popleft(), role=segment.role))
        speaker = "assistant" if any(s.role for s in self.document.segments) else None
        return Document(segments + [replace(s, role=speaker) for s in made], self.document.id)


class InterleavedGenerator:
    """Runs a batch of documents. `rows` and `context` may be looked at between events.

    Args:
        model: what reads, writes and draws.
        processor: turns documents into tokens and pictures into pixels.
        settings: how; what they leave open is as the model has it.
        progress: whether to give an event for every denoising step.
    """

    def __init__(
        self,
        model: MMInterleavedModel,
        processor: MMInterleavedProcessor,
        settings: GenerationSettings,
        progress: bool = True,
    ) -> None:
        self.model, self.processor, self.progress = model, processor, progress
        self.settings = replace(settings, image=model.image_decoder.settled(settings.image))
        config = model.config
        self.limit = min(config.text_config.max_position_embeddings, config.max_context_length)
        self.most_images = config.mmfs.max_images - 1
        self.banned = [config.image_token_id]  # an image slot in the text would have no picture

    def plan(self, document: Document) -> deque[TokenStream | Turn]:
        """A document as given stretches and open slots in turn; the first is always a stretch."""
        queue: deque[TokenStream | Turn] = deque()
        run: list[Segment] = []
        slot: Segment | None = None
        for segment in [*self.processor.render(document), None]:
            if segment is not None and not segment.is_open:
                run.append(segment)
                continue
            if run or not queue:
                queue.append(self.processor.encode(run, start=not queue, after_image=isinstance(slot, Image)))
            if segment is not None:
                queue.append("text" if isinstance(segment, Text) else "image")
            run, slot = [], segment
        return queue

    def prepare(self, document: Document) -> Prepared:
        """What `start` does with a document before the model is needed; any thread may do it ahead.

        Raises:
            DocumentError: it cannot be used, or what it gives is more than the model reads.
        """
        _check_forced(document)
        plan = self.plan(document)
        self._check_length(plan)
        return Prepared(document, plan)

    def start(self, documents: Sequence[Document | Prepared], seeds: Sequence[int] | None = None) -> None:
        """Take documents in, without reading their pictures.

        Args:
            documents: what is to be filled and continued, prepared or not.
            seeds: for each document, of its texts and its pictures, in place of the settings'; None: the settings'.

        Raises:
            DocumentError: a document cannot be used, or what it gives is more than the model reads.
            ValueError: pictures cannot be drawn with these settings.
        """
        self.model.image_decoder.sampler(self.settings.image)
        self.rows: list[_Row] = []
        for index, document in enumerate(documents):
            try:
                given = document if isinstance(document, Prepared) else self.prepare(document)
            except DocumentError as error:
                raise error.at(document.place or f"document {index}") from None
            seed, image_seed = (
                (self.settings.seed, self.settings.image.seed) if seeds is None else (seeds[index], seeds[index])
            )
            self.rows.append(self._row(given, seed, image_seed))
        eyes = eyes_of(self.model, self.settings.text.cache_implementation)
        self.context = Context.empty(self.model, len(self.rows), eyes)

    def _row(self, given: Prepared, seed: int, image_seed: int) -> _Row:
        """A document at its start."""
        document = given.document
        slots = sum(1 for item in given.plan if isinstance(item, str))
        asked = self._asked_turns(document)
        usual = CHAT_TURNS if any(s.role for s in document.segments) else ORIGINAL_TURNS
        goes_on = bool(asked) or not slots
        generator = torch.Generator().manual_seed(seed)
        return _Row(document, deque(given.plan), asked or slots or usual, goes_on, generator, image_seed)

    def _asked_turns(self, document: Document) -> int | None:
        """Most turns, if the settings or the document say; see `GenerationSettings.max_turns`."""
        asked, own, record = self.settings.max_turns, document.max_turns, document.record
        if record is not None and self._stops_at_eos(document):
            return asked or ORIGINAL_TURNS
        if record is not None and record.get("num_iter") is not None:
            return own
        return asked or own

    def _check_length(self, queue: deque[TokenStream | Turn]) -> None:
        given = [item for item in queue if isinstance(item, TokenStream)]
        tokens, images = sum(len(s) for s in given), sum(len(s.images) for s in given)
        if tokens > self.limit:
            raise DocumentError(
                f"{tokens} tokens are more than the {self.limit} that the model reads", fix="Shorten it"
            )
        if images > self.most_images:
            raise DocumentError(
                f"{images} pictures are more than the {self.most_images} that the model tells apart",
                fix="Leave some out",
            )

    def run(self, documents: Sequence[Document | Prepared], seeds: Sequence[int] | None = None) -> Iterator[Event]:
        """Generate.

        Args:
            documents: what is to be filled and continued, prepared or not.
            seeds: as for `start`.

        Raises:
            DocumentError: a document cannot be used, or what it gives is more than the model reads.
            ValueError: pictures cannot be drawn with these settings.
        """
        self.start(documents, seeds)
        size = self.settings.image.batch_size
        while any(row.reason is None for row in self.rows):
            yield from self._advance()
            if writing := self._waiting_for("text"):
                yield from self._write(writing)
            yield from self._advance()
            drawing = self._waiting_for("image")
            for begin in range(0, len(drawing), size):
                yield from self._draw(drawing[begin : begin + size])

    def _waiting_for(self, turn: Turn) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.reason is None and row.next_turn == turn]

    def _advance(self) -> Iterator[Event]:
        """Read what stands before the next slot of each row; decide what each does next; end those that are done."""
        streams = [TokenStream.empty()] * len(self.rows)
        for index, row in enumerate(self.rows):
            if row.reason is None and row.queue and isinstance(row.queue[0], TokenStream):
                if not self._fits(row, len(row.queue[0]), len(row.queue[0].images)):
                    row.reason = "context"
                    yield DocumentFinished(index, row.result(), row.reason)
                    continue
                streams[index] = row.queue.popleft()
                row.ids += streams[index].ids.tolist()
                row.images += streams[index].images
        if any(len(stream) for stream in streams):
            batch = self.processor.collate(streams, padding_side="left")
            self.context.append(batch.input_ids, batch.attention_mask, batch.pixel_values)
        for index, row in enumerate(self.rows):
            if row.reason is None:
                row.next_turn = row.queue[0] if row.queue else row.next_turn
                row.reason = self._why_done(row)
                if row.reason is not None:
                    yield DocumentFinished(index, row.result(), row.reason)

    def _fits(self, row: _Row, tokens: int, images: int) -> bool:
        return len(row.ids) + tokens <= self.limit and len(row.images) + images <= self.most_images

    def _why_done(self, row: _Row) -> str | None:
        """Why a row has nothing more to do; None if it has."""
        settings, images = self.settings, sum(isinstance(s, Image) for s in row.made)
        if not row.queue and not row.goes_on:
            return "slots"
        reached = [
            ("turns", row.turns, row.max_turns),
            ("segments", len(row.made), settings.max_segments),
            ("tokens", row.tokens, settings.max_tokens),
            ("images", images, settings.max_images),
        ]
        for name, count, most in reached:
            if most is not None and count >= most:
                return name
        draws = row.next_turn == "image"
        fits = self._fits(row, 1 + self.model.config.num_image_tokens if draws else 1, int(draws))
        return None if fits else "context"

    # ---- text

    def _write(self, chosen: list[int]) -> Iterator[Event]:
        self.context.flush()
        start = self.context.mask.shape[1]
        rooms = [self._room(row) for row in self.rows]
        if self.settings.text.num_beams > 1:
            texts = self._write_beams(chosen, rooms)
        else:
            texts = yield from self._write_stream(chosen, rooms)
        for index in chosen:
            yield from self._after_text(index, texts[index], start)

    def _room(self, row: _Row) -> int:
        """Most tokens that may be written in this turn."""
        most = [self.settings.text.max_new_tokens, self.limit - len(row.ids)]
        if self.settings.max_tokens is not None:
            most.append(self.settings.max_tokens - row.tokens)
        return min(most)

    def _write_stream(self, chosen: list[int], rooms: list[int]) -> Generator[Event, None, dict[int, WrittenText]]:
        """Write token by token; returns the texts by row."""
        texts = [WrittenText([]) for _ in self.rows]
        shown = [""] * len(self.rows)
        active = torch.tensor([i in chosen for i in range(len(self.rows))], device=self.context.mask.device)
        generators = [row.generator for row in self.rows]
        for step in write(self.context, self.settings.text, generators, active, torch.tensor(rooms), self.banned):
            add_tokens(step, texts, end_tokens(self.model))
            for index in chosen:
                text = self.processor.decode_text(texts[index].ids)
                if len(text) > len(shown[index]) and not text.endswith("\ufffd"):  # not in the middle of a character
                    yield TextDelta(index, text[len(shown[index]) :])
                    shown[index] = text
        return {i: texts[i] for i in chosen}

    def _write_beams(self, chosen: list[int], rooms: list[int]) -> dict[int, WrittenText]:
        texts: dict[int, WrittenText] = {}
        for room in sorted({rooms[i] for i in chosen}):  # together, but none is cut short by another's lack of room
            rows = [i for i in chosen if rooms[i] == room]
            context = self.context.select(torch.tensor(rows, device=self.context.mask.device))
            settings = replace(self.settings.text, max_new_tokens=room)
            texts |= zip(rows, (found[0] for found in write_beams(context, settings, self.banned)), strict=True)
        self._read_text({index: text.ids for index, text in texts.items()})
        return texts

    def _read_text(self, ids: dict[int, list[int]]) -> None:
        """Let rows read plain text, when it is needed."""
        tokens = torch.full((len(self.rows), max(len(i) for i in ids.values())), self.model.config.pad_token_id)
        mask = torch.zeros_like(tokens)
        for row, text in ids.items():
            tokens[row, : len(text)] = torch.tensor(text, dtype=torch.long)
            mask[row, : len(text)] = 1
        if mask.any():
            self.context.defer(partial(self.context.append, tokens, mask))

    def _after_text(self, index: int, text: WrittenText, start: int) -> Iterator[Event]:
        """What a finished text means for its row."""
        row, config = self.rows[index], self.model.config
        segment, ids, end = Text(self.processor.decode_text(text.ids)), text.ids, text.end
        forced = row.document.forced_texts[row.turns] if row.turns < len(row.document.forced_texts) else ""
        forced = forced if self.settings.replace_texts and forced else None
        if forced is not None:
            ids = encode_text(self.processor.tokenizer, forced)
            end = ids.pop() if ids and ids[-1] in end_tokens(self.model) else None
            if not self._fits(row, len(ids), 0):
                row.reason = "context"
                yield DocumentFinished(index, row.result(), row.reason)
                return
        if forced is not None or config.bos_token_id in ids:  # <s> starts a document: what follows sees no picture
            self.context.forget(index, start)
            self._read_text({index: ids})
        row.ids += ids
        row.tokens += len(text.all_ids)
        row.made.append(segment if forced is None else Text(forced))
        row.take_slot()
        yield SegmentFinished(index, row.turns, segment, text.all_ids, replaced_by=forced)
        row.turns += 1
        row.next_turn = "image" if end == config.soi_token_id or self.settings.force_image else "text"
        if end == config.eos_token_id and self._stops_at_eos(row.document) and row.goes_on and not row.queue:
            row.reason = "eos"
            yield DocumentFinished(index, row.result(), row.reason)

    def _stops_at_eos(self, document: Document) -> bool:
        choices = (self.settings.stop_at_eos, document.stop_at_eos, True)
        return next(choice for choice in choices if choice is not None)

    # ---- pictures

    def _draw(self, chosen: list[int]) -> Iterator[Event]:
        self._announce(chosen)
        decoder, settings = self.model.image_decoder, self.settings.image
        with torch.no_grad():
            conditions = decoder.resampler(*self.context.image_context(chosen))
        earlier = self.context.earlier_images(chosen)
        candidates: list[list[PIL.Image.Image]] = [[] for _ in chosen]
        decode = partial(decoder.decode, half=True) if settings.decode_dtype == "bfloat16" else decoder.decode
        for number in range(settings.num_candidates):
            rows = [self.rows[i] for i in chosen]
            seeds = [row.image_seed + number + (row.turns if self.settings.vary_noise else 0) for row in rows]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            for step in decoder.denoise(conditions, earlier, settings, generators):
                if self.progress:
                    yield from _progress(chosen, number, step)
            for pictures, values in zip(candidates, decode(step.latents), strict=True):
                pictures.append(to_picture(values.float().cpu().numpy()))
        first = self.processor.pixels([pictures[0] for pictures in candidates])
        if uses_static(self.model, self.settings.text.cache_implementation):
            self.context.defer(partial(read_images, self.context, chosen, first))
        else:
            self.context.defer(partial(self.context.append_images, chosen, first))
        for index, pictures in zip(chosen, candidates, strict=True):
            row = self.rows[index]
            row.ids += [self.model.config.image_token_id] * self.model.config.num_image_tokens
            row.made.append(Image(pictures[0]))
            row.images.append(row.made[-1])
            row.take_slot()
            yield SegmentFinished(index, row.turns, row.made[-1], candidates=pictures)
            row.turns += 1
            row.next_turn = "text"

    def _announce(self, chosen: list[int]) -> None:
        """Read the begin-of-image token in the rows that draw."""
        device = self.context.mask.device
        ids = torch.full((len(self.rows),), self.model.config.soi_token_id, device=device)
        draws = torch.tensor([i in chosen for i in range(len(self.rows))], device=device)
        if uses_static(self.model, self.settings.text.cache_implementation):
            read_column(self.context, ids, draws)
        else:
            self.context.append(ids[:, None], draws[:, None].long())
        for index in chosen:
            self.rows[index].ids.append(self.model.config.soi_token_id)


def _check_forced(document: Document) -> None:
    """A forced text may ask for a picture by ending in a begin-of-image token; it cannot show one."""
    field_name = "forced_texts" if document.record is None else "multiround_context"
    for index, text in enumerate(document.forced_texts):
        before = text.rstrip().removesuffix(SOI_TOKEN)
        for token in (SOI_TOKEN, IMAGE_TOKEN):
            if token in before:
                raise DocumentError(f"the text contains the reserved token '{token}'", f"{field_name}[{index}]",
                                    f"Only '{SOI_TOKEN}' may stand there, at the very end, for a picture")  # fmt: skip


def _progress(chosen: list[int], candidate: int, step: DenoisingStep) -> Iterator[Event]:
    for position, index in enumerate(chosen):
        preview = None if step.preview is None else to_picture(step.preview[position].float().cpu().numpy())
        yield ImageProgress(index, candidate, step.index, step.total, preview)
