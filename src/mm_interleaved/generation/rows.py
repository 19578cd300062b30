"""The turns of documents over rows of one generation state, by the rules of docs/model.md, "Interleaved generation".

A document is processed up to its first open slot. A text slot is filled until `</s>` or a begin-of-image token. An
image slot is filled from everything before it, and the image is encoded. After the last slot a document may continue by
itself: with text, and with an image whenever a text ends with a begin-of-image token. The result of a turn is processed
when its document continues, so the last text or image of a document never is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..document import ORIGINAL_TURNS, Document, Generated, Image, Segment, Text
from ..io import InputError
from ..model import MMInterleavedModel
from ..processor import MMInterleavedProcessor
from ..processor.packing import TokenStream
from ..processor.tokenizer import IMAGE_TOKEN, SOI_TOKEN, encode_text
from .events import DocumentFinished, Event, SegmentFinished
from .rules import WrittenText, end_tokens
from .settings import GenerationSettings
from .state import GenerationState

Turn = Literal["text", "image"]
CHAT_TURNS = 4  # most texts and images of an answer in a conversation


@dataclass(frozen=True)
class PreparedDocument:
    """A document that was checked and turned into tokens.

    Attributes:
        document: the input.
        plan: its given parts and its open slots, alternating; the first entry is always a given part.
        digests: of the images of the first part, if they were asked for.
    """

    document: Document
    plan: Sequence[TokenStream | Turn]
    digests: Sequence[bytes] = ()


def _text_stream(ids: Sequence[int]) -> TokenStream:
    """A stream of text tokens."""
    return TokenStream(np.array(ids, np.int64), np.zeros(len(ids), bool), [])


@dataclass
class Row:
    """The progress of one document.

    Attributes:
        document: the input.
        settings: its settings.
        queue: the given parts and open slots that are still to come.
        max_turns: most texts and images to generate.
        goes_on: whether it continues by itself after its last slot.
        generator: random numbers of sampled text.
        image_seed: seed of its images.
        ids: all its tokens so far.
        images: all its images so far.
        digests: of the first of them.
        unread_image: pixels [3, side, side] of an image that the model has not processed, but its begin-of-image token.
        unread: the tokens after it that the model has not processed.
        next_turn: the kind of the next turn.
        turns: number of texts and images generated.
        made: the generated segments.
        tokens: number of text tokens generated.
        reason: why it ended; None: it has not.
    """

    document: Document
    settings: GenerationSettings
    queue: deque[TokenStream | Turn]
    max_turns: int
    goes_on: bool
    generator: torch.Generator
    image_seed: int
    ids: list[int] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    unread_image: Tensor | None = None
    unread: TokenStream = field(default_factory=TokenStream.empty)
    next_turn: Turn = "text"
    turns: int = 0
    made: list[Segment] = field(default_factory=list)
    tokens: int = 0
    reason: str | None = None

    def take_slot(self) -> None:
        """Remove the slot that was just filled from the queue."""
        if self.queue:
            self.queue.popleft()

    def noise_seed(self, candidate: int) -> int:
        """The seed of the noise of a candidate of the next image."""
        return self.image_seed + candidate + (self.turns if self.settings.vary_noise else 0)

    def result(self) -> Document:
        """The document with its slots filled, and its continuation."""
        made, segments, given = deque(self.made), [], self.document
        for segment in given.segments:
            if not segment.is_open:  # segments that an earlier session generated count as given
                segments.append(segment if segment.generated is None else replace(segment, generated=None))
            elif made:
                segments.append(replace(made.popleft(), role=segment.role))
        speaker = "assistant" if any(s.role for s in given.segments) else None
        segments += [replace(s, role=speaker) for s in made]
        return Document(segments, given.id, stop_at_eos=given.stop_at_eos, record=given.record, place=given.place)


class DocumentRows:
    """Documents in rows of one generation state, and what each of them does next.

    Args:
        model: the model.
        processor: turns documents into tokens and images into pixels.

    Attributes:
        rows: the progress of each document.
        state: what the model has processed of each; row i of `state` belongs to `rows[i]`.
    """

    rows: list[Row]
    state: GenerationState

    def __init__(self, model: MMInterleavedModel, processor: MMInterleavedProcessor) -> None:
        self.model, self.processor = model, processor
        self.limit = model.context_length
        self.most_images = model.config.mmfs.max_images - 1
        self.banned = [model.config.image_token_id]  # an image token in the text would have no image

    def plan(self, document: Document) -> deque[TokenStream | Turn]:
        """The given parts and the open slots of a document, alternating; the first entry is always a given part."""
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

    def prepare(self, document: Document, name: str | None = None) -> PreparedDocument:
        """The part of `start` that needs no model; any thread may call it in advance.

        Args:
            document: the document to fill and continue.
            name: its name in errors, if it has neither a place nor an id.

        Raises:
            InputError: it cannot be used, or it is longer than the model's context.
        """
        try:
            _check_forced(document)
            plan = self.plan(document)
            self._check_length(plan)
        except InputError as error:
            nameless = not (document.place or document.id)
            raise error.at(name if name is not None and nameless else document.name) from None
        return PreparedDocument(document, plan)

    def _row(self, given: PreparedDocument, settings: GenerationSettings, seed: int, image_seed: int) -> Row:
        """The row of a document at its start."""
        document = given.document
        slots = sum(1 for item in given.plan if isinstance(item, str))
        asked = _asked_turns(document, settings)
        usual = CHAT_TURNS if any(s.role for s in document.segments) else ORIGINAL_TURNS
        goes_on = bool(asked) or not slots
        generator = torch.Generator().manual_seed(seed)
        return Row(document, settings, deque(given.plan), asked or slots or usual, goes_on, generator, image_seed,
                   digests=list(given.digests))  # fmt: skip

    def _check_length(self, queue: deque[TokenStream | Turn]) -> None:
        given = [item for item in queue if isinstance(item, TokenStream)]
        tokens, images = sum(len(s) for s in given), sum(len(s.images) for s in given)
        if tokens > self.limit:
            raise InputError(f"{tokens} tokens are more than the {self.limit} of the model's context", fix="Shorten it")
        if images > self.most_images:
            raise InputError(
                f"{images} images are more than the {self.most_images} that the model distinguishes",
                fix="Leave some out",
            )

    def _advance(self, chosen: Sequence[int]) -> Iterator[Event]:
        """Decide the next turn of `chosen` rows, end those that are done, and process what the others have unread."""
        yield from self._decide(chosen)
        self._read([index for index in chosen if self.rows[index].reason is None])

    def _decide(self, chosen: Sequence[int]) -> Iterator[Event]:
        """Decide the next turn of `chosen` rows, and end those that are done."""
        for index in chosen:
            row = self.rows[index]
            self._take_stretch(row)
            if row.reason is not None:
                yield DocumentFinished(index, row.result(), row.reason)

    def _take_stretch(self, row: Row) -> None:
        """Append the given part before the next slot to a row, or end the row."""
        stretch = row.queue[0] if row.queue else None
        if isinstance(stretch, TokenStream):
            if not self._fits(row, len(stretch), len(stretch.images)):
                row.reason = "context"
                return
            row.queue.popleft()
            row.unread += stretch
            row.ids += stretch.ids.tolist()
            row.images += stretch.images
        slot = row.queue[0] if row.queue else row.next_turn
        assert not isinstance(slot, TokenStream)  # slots and given parts alternate
        row.next_turn = slot
        row.reason = self._why_done(row)

    def _read(self, chosen: Sequence[int], most: int | None = None) -> None:
        """Process the unread tokens of the rows `chosen`; of each about `most` at most, and no part of an image."""
        waiting = {i: pixels for i in chosen if (pixels := self.rows[i].unread_image) is not None}
        if waiting:
            self.state.append_images(list(waiting), torch.stack(list(waiting.values())))
        for index in waiting:
            self.rows[index].unread_image = None
        waiting = [i for i in chosen if len(self.rows[i].unread)]
        if waiting:
            parts = [self._cut(self.rows[i].unread, most) for i in waiting]
            batch = self.processor.collate([first for first, _ in parts], padding_side="left")
            self.state.prefill(batch.input_ids, batch.attention_mask, batch.pixel_values, waiting)
            for index, (_, rest) in zip(waiting, parts, strict=True):
                self.rows[index].unread = rest

    def _cut(self, stream: TokenStream, most: int | None) -> tuple[TokenStream, TokenStream]:
        """The first tokens of a stream, about `most`, and the others; an image is in one of them."""
        if most is None or len(stream) <= most:
            return stream, TokenStream.empty()
        starts = np.flatnonzero(stream.ids != self.model.config.image_token_id)  # where a part may begin
        starts = starts[starts > 0]
        number = int(np.searchsorted(starts, most, side="right")) - 1
        if not len(starts):
            return stream, TokenStream.empty()
        return stream.split(int(starts[max(number, 0)]), self.model.config.soi_token_id)

    def _fits(self, row: Row, tokens: int, images: int) -> bool:
        return len(row.ids) + tokens <= self.limit and len(row.images) + images <= self.most_images

    def _why_done(self, row: Row) -> str | None:
        """Why a row is done; None: it is not."""
        settings, images = row.settings, sum(isinstance(s, Image) for s in row.made)
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
        is_image = row.next_turn == "image"
        fits = self._fits(row, 1 + self.model.config.num_image_tokens if is_image else 1, int(is_image))
        return None if fits else "context"

    def _most_tokens(self, row: Row) -> int:
        """Most tokens that may be generated in this turn."""
        most = [row.settings.text.max_new_tokens, self.limit - len(row.ids)]
        if row.settings.max_tokens is not None:
            most.append(row.settings.max_tokens - row.tokens)
        return min(most)

    def _after_text(self, index: int, text: WrittenText, start: int) -> Iterator[Event]:
        """Update a row after a text; the model had processed `start` tokens of the row before it."""
        row, config = self.rows[index], self.model.config
        written, ids, end = self.processor.decode_text(text.ids), text.ids, text.end
        forced = row.document.forced_texts[row.turns] if row.turns < len(row.document.forced_texts) else ""
        forced = forced if row.settings.replace_texts and forced else None
        if forced is not None:
            ids = encode_text(self.processor.tokenizer, forced)
            end = ids.pop() if ids and ids[-1] in end_tokens(self.model) else None
            if not self._fits(row, len(ids), 0):
                row.reason = "context"
                yield DocumentFinished(index, row.result(), row.reason)
                return
        if forced is not None or config.bos_token_id in ids:  # after <s> earlier images are invisible
            self.state.truncate(index, start)
        row.unread = _text_stream(ids[self.state.lengths[index] - start :])
        row.ids += ids
        row.tokens += len(text.all_ids)
        generated = Generated(row.turns, ids=tuple(text.all_ids), text=written)
        row.made.append(Text(written if forced is None else forced, generated=generated))
        row.take_slot()
        yield SegmentFinished(index, row.made[-1])
        row.turns += 1
        row.next_turn = "image" if end == config.soi_token_id or row.settings.force_image else "text"
        if end == config.eos_token_id and _stops_at_eos(row.document, row.settings) and row.goes_on and not row.queue:
            row.reason = "eos"
            yield DocumentFinished(index, row.result(), row.reason)

    def _after_image(self, index: int, candidates: list[PIL.Image.Image], pixels: Tensor) -> SegmentFinished:
        """Update a row after an image."""
        row, config = self.rows[index], self.model.config
        row.unread_image = pixels
        row.ids += [config.image_token_id] * config.num_image_tokens
        image = Image(candidates[0], generated=Generated(row.turns, candidates=tuple(candidates)))
        row.made.append(image)
        row.images.append(image)
        row.take_slot()
        row.turns += 1
        row.next_turn = "text"
        return SegmentFinished(index, row.made[-1])

    def _announce(self, chosen: list[int]) -> None:
        """Process the begin-of-image token in the rows that get an image."""
        token = self.model.config.soi_token_id
        tokens = torch.full((len(chosen), 1), token)
        self.state.prefill(tokens, torch.ones_like(tokens), rows=chosen)
        for index in chosen:
            self.rows[index].ids.append(token)


def _asked_turns(document: Document, settings: GenerationSettings) -> int | None:
    """The most turns by settings or document; see `GenerationSettings.max_turns`."""
    asked, own, record = settings.max_turns, document.max_turns, document.record
    if record is not None and _stops_at_eos(document, settings):
        return asked or ORIGINAL_TURNS
    if record is not None and record.get("num_iter") is not None:
        return own
    return asked or own


def _stops_at_eos(document: Document, settings: GenerationSettings) -> bool:
    choices = (settings.stop_at_eos, document.stop_at_eos, True)
    return next(choice for choice in choices if choice is not None)


def _check_forced(document: Document) -> None:
    """Check the forced texts: a begin-of-image token may stand only at the end, where it requests an image."""
    field_name = "forced_texts" if document.record is None else "multiround_context"
    for index, text in enumerate(document.forced_texts):
        before = text.rstrip().removesuffix(SOI_TOKEN)
        for token in (SOI_TOKEN, IMAGE_TOKEN):
            if token in before:
                raise InputError(f"the text contains the reserved token '{token}'", f"{field_name}[{index}]",
                                 f"Only '{SOI_TOKEN}' may stand there, at the very end, for an image")  # fmt: skip
