"""One source as a stream of packed rows that can stop anywhere and continue there.

Every random number has a generator of its own, seeded by its use (purpose, seed, epoch, source, pass, shard, line,
...). So none depends on earlier ones, and a state contains no generator. Documents are shuffled in windows of `shuffle`
records. A state has the start of the window, the number of its used records, and the records whose tokens are in the
packing buffer. These are read again on resumption; earlier records are not.
"""

from __future__ import annotations

import itertools
import secrets
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import numpy as np

from ..document import Document
from ..io import InputError
from ..processor import MMInterleavedProcessor
from ..processor.packing import Cut, Packing, PackingRules, TokenStream
from .augmentation import augment
from .config import SourceConfig
from .readers import Reader
from .report import DataError, DataReport, Rejected
from .shards import Record
from .sources import SOURCES

PLAIN_WINDOW = 64  # records read at a time without shuffling


class Purpose(IntEnum):
    """The use of a generator."""

    SHARDS = 0
    WINDOW = 1
    DOCUMENT = 2
    MERGE = 3
    MIXTURE = 4
    GROUPS = 5


def generator(purpose: Purpose, *keys: int) -> np.random.Generator:
    """The generator for these keys."""
    return np.random.default_rng(np.random.SeedSequence([purpose, *keys]))


@dataclass(frozen=True)
class Place:
    """The part of the data that this process reads: it is consumer number `consumer` of `consumers`."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    num_workers: int = 1

    @property
    def consumer(self) -> int:
        """The number of this consumer: data are divided among ranks first, then among workers."""
        return self.rank + self.world_size * self.worker

    @property
    def consumers(self) -> int:
        """The number of consumers."""
        return self.world_size * self.num_workers


class SourceStream:
    """Rows of one source for one process.

    Args:
        config: settings of the source.
        reader: reader of its records.
        processor: turns documents into tokens.
        index: its number in the mixture.
        seed: seed of the run.
        epoch: epoch of the run.
        place: the part that is read here: whole shards if there are enough of them, else every n-th line of all shards.
        forever: whether passes repeat endlessly; the rest of a pass is then the start of the next one.
        report: counts what is read and left out.
    """

    def __init__(
        self,
        config: SourceConfig,
        reader: Reader,
        processor: MMInterleavedProcessor,
        *,
        index: int,
        seed: int,
        epoch: int,
        place: Place,
        forever: bool,
        report: DataReport,
    ) -> None:
        self.config, self.reader, self.processor, self.place, self.report = config, reader, processor, place, report
        self._keys = (seed, epoch, index)
        self._entropy = secrets.randbits(62) if "unseeded_order" in config.compat else 0
        self._limit = self._row_limit()
        self._loops = forever or self._limit is not None
        self._rules = PackingRules(
            min(config.max_length or processor.max_length, processor.max_length),
            processor.num_image_tokens,
            processor.tokenizer.bos_token_id,
            processor.soi_token_id,
            config.max_images_per_sequence,
            cast(Cut, config.cut) if config.cut else "document" if config.is_pairs else "image",
            cast(Packing, config.packing),
        )
        self._whole = config.packing != "stream"
        self._buffer = TokenStream.empty()
        self._waiting: deque[tuple[list[int], int]] = deque()  # record and number of tokens, for each in the buffer
        self._skip = 0  # tokens of the first of them that are used
        self._rows_ever = 0
        self.passes = -1
        self.restart()

    def _row_limit(self) -> int | None:
        """Rows of an epoch for this process (docs/data_formats.md, "Shuffling and epochs")."""
        if self.config.num_samples is None:
            return None
        shares = (self.config.batch_size * self.place.world_size, self.place.num_workers)
        batches = self.config.num_samples
        for share in shares:
            batches = batches // share if self.config.floor else -(-batches // share)
        return max(batches, 1) * self.config.batch_size

    def restart(self) -> None:
        """Start the next pass, and reset the number of rows."""
        self._rows = 0
        self._begin_pass()

    def _begin_pass(self) -> None:
        self.passes += 1
        self._documents = self._pass_rows = self._pass_dropped = 0
        self._draining = False
        count = len(self.reader.shards.names)
        self._by_line = count < self.place.consumers
        order = np.arange(count)
        if self.config.shuffle_shards:
            order = generator(Purpose.SHARDS, *self._keys, self.passes).permutation(count)
        self._mine = order if self._by_line else order[self.place.consumer :: self.place.consumers]
        self._cursor, self._window_number = [0, 0, 0], 0  # shard (as a position in `_mine`), offset, line
        self._records = self._read(self.report)
        self._window: list[Record] = []
        self._window_start, self._used = list(self._cursor), 0

    # ---- rows

    def next_row(self) -> TokenStream | None:
        """The next row; None: the pass is over (or the limit reached), or a whole pass has no document.

        Raises:
            DataError: a row is too short for one image.
        """
        if self._limit is not None and self._rows >= self._limit:
            return None
        while (row := self._take()) is None:
            found = self._next_document()
            if found is not None:
                self._documents += 1
                record, stream = found
                self._buffer = self._buffer + stream
                self._waiting.append(([self.passes, record.shard, record.offset, record.line], len(stream)))
            elif self._loops and self._documents and (self._pass_rows or not self._pass_dropped):
                self._begin_pass()
            elif (self.config.keep_remainder or self._whole) and len(self._buffer) and not self._draining:
                self._draining = True
            else:
                self._drop_remainder()
                return None
        self._pass_rows, self._rows, self._rows_ever = self._pass_rows + 1, self._rows + 1, self._rows_ever + 1
        return row

    def _take(self) -> TokenStream | None:
        """A row from the buffer; None: the buffer is too short."""
        while True:
            try:
                taken = self._rules.take(self._buffer, last=self._draining)
            except ValueError as error:
                raise DataError(f"source '{self.config.name}': {error}") from None
            if taken is None:
                return None
            row, self._buffer = taken
            self._skip += len(row)
            while self._waiting and self._skip >= self._waiting[0][1]:
                self._skip -= self._waiting.popleft()[1]
            if row.images or self.config.keep_text_only or self._whole:
                return self._merged(row)
            self._pass_dropped += 1
            self.report.reject(self.config.name, "row without an image")

    def _drop_remainder(self) -> None:
        if len(self._buffer):
            self.report.reject(
                self.config.name, "remainder shorter than a row", f"{len(self._buffer)} tokens; see keep_remainder"
            )
        self._buffer, self._skip = TokenStream.empty(), 0
        self._waiting.clear()

    def _merged(self, row: TokenStream) -> TokenStream:
        """Merge pairs into contexts of k pairs: remove the `</s><s>` between pairs, except at every k-th."""
        if not self.config.few_shot_merge_prob or "merge_without_effect" in self.config.compat:
            return row
        rng = generator(Purpose.MERGE, *self._keys, self.place.consumer, self._rows_ever)
        if rng.random() >= self.config.few_shot_merge_prob:
            return row
        size = int(rng.choice(self.config.few_shot_merge_sizes))
        tokens = self.processor.tokenizer
        border = (row.ids[:-1] == tokens.eos_token_id) & (row.ids[1:] == tokens.bos_token_id)
        places = np.flatnonzero(border)
        gone = places[np.arange(1, len(places) + 1) % size != 0]
        kept = np.ones(len(row), bool)
        kept[gone] = kept[gone + 1] = False
        return row.select(kept, row.images)

    # ---- documents

    def _next_document(self) -> tuple[Record, TokenStream] | None:
        """The next document of the pass as tokens; None: there is none left."""
        while True:
            if self._used >= len(self._window) and not self._fill_window():
                return None
            record = self._window[self._used]
            self._used += 1
            self.report.count(self.config.name, "records")
            try:
                stream = self._encode(record, self.passes, self.report)
            except Rejected as rejected:
                self.report.reject(self.config.name, rejected.reason, rejected.example)
                continue
            self.report.count(self.config.name, "documents")
            return record, stream

    def _fill_window(self) -> bool:
        """Read the next records and shuffle them."""
        self._window_start, self._used = list(self._cursor), 0
        size = self.config.shuffle or PLAIN_WINDOW
        window = list(itertools.islice(self._records, size))
        if self.config.shuffle:
            keys = (*self._keys, self.passes, self.place.consumer, self._window_number, self._entropy)
            window = [window[i] for i in generator(Purpose.WINDOW, *keys).permutation(len(window))]
        self._window = window
        self._window_number += 1
        return bool(window)

    def _read(self, report: DataReport) -> Iterator[Record]:
        """The records of this process from the cursor on."""
        shards, consumer, consumers = self.reader.shards, self.place.consumer, self.place.consumers
        while self._cursor[0] < len(self._mine):
            shard = int(self._mine[self._cursor[0]])
            ours = not self._by_line or shard % consumers == consumer  # one process counts a shard that several read
            fresh = self._cursor[1] == 0
            try:
                for record in shards.records(shard, *self._cursor[1:]):
                    if fresh and ours:
                        report.count(self.config.name, "shards")
                    fresh = False
                    self._cursor[1:] = [record.end, record.line + 1]
                    if not self._by_line or record.line % consumers == consumer:
                        yield record
            except Rejected as rejected:
                if ours:
                    report.reject(self.config.name, rejected.reason, rejected.example)
            self._cursor = [self._cursor[0] + 1, 0, 0]

    def _encode(self, record: Record, passes: int, report: DataReport) -> TokenStream:
        rng = generator(Purpose.DOCUMENT, *self._keys, passes, record.shard, record.line)
        name = self.config.name
        document = self.reader.document(record, rng, lambda reason, example: report.reject(name, reason, example))
        if not isinstance(document, Document):  # a plug-in's mistake
            where = f"source '{name}', {self.reader.shards.place(record)}"
            given = f"{SOURCES.describe(self.config.type)} gave a {type(document).__name__} in place of a document"
            raise DataError(given, where, "'document' of its reader must return a Document, or raise Rejected to leave "
                            "the record out")  # fmt: skip
        try:
            document = augment(document, self.config.augment, rng, getattr(self.reader, "crop", None))
            stream = self.processor.encode(self.processor.render(document), close=True)
        except InputError as error:
            raise Rejected("document cannot be encoded", f"{document.place}: {error}") from None
        if not self._teaches(stream):
            raise Rejected("nothing to learn", f"{document.place}: no text and no image in it is supervised")
        if self._whole and (excess := self._rules.excess(stream)) is not None:
            where = document.place or self.reader.shards.place(record)
            if self.config.too_long == "drop":
                raise Rejected("document longer than a row", f"{where}: {excess}")
            advice = "Shorten it, raise the limit, or leave such documents out with 'too_long: drop'"
            raise DataError(f"the document has {excess}", f"source '{name}', {where}", advice)
        return self._shortened(stream) if self.config.is_pairs and not self._whole else stream

    def _teaches(self, stream: TokenStream) -> bool:
        """Whether a text, of which `</s>` alone is not one, or an image of the stream is learned."""
        tokens = self.processor.tokenizer
        empty = np.isin(stream.ids, [self.processor.image_token_id, tokens.bos_token_id, tokens.eos_token_id])
        return bool((stream.learned & ~empty).any())

    def _shortened(self, stream: TokenStream) -> TokenStream:
        """A pair shortened to the length of a row: the caption is cut, never the image."""
        length, tail = self._rules.length, self._rules.num_image_tokens + 2
        if len(stream) <= length:
            return stream
        if stream.ids[1] == self._rules.soi_token_id:
            return stream.select(slice(length), stream.images)
        kept = np.ones(len(stream), bool)
        kept[length - tail : -tail] = False
        return stream.select(kept, stream.images)

    # ---- saving and resuming

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream: a few numbers for each document in the packing buffer, no text and no pixels."""
        return {
            "passes": self.passes,
            "documents": self._documents,
            "pass_rows": self._pass_rows,
            "pass_dropped": self._pass_dropped,
            "rows": self._rows,
            "rows_ever": self._rows_ever,
            "draining": self._draining,
            "window_start": list(self._window_start),
            "window_number": self._window_number,
            "used": self._used,
            "waiting": [[*key, length] for key, length in self._waiting],
            "skip": self._skip,
            "entropy": self._entropy,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called.

        Raises:
            DataError: the data have changed since.
        """
        self.passes = state["passes"] - 1
        self._begin_pass()
        self._entropy, self._rows, self._rows_ever = state["entropy"], state["rows"], state["rows_ever"]
        self._documents, self._draining = state["documents"], state["draining"]
        self._pass_rows, self._pass_dropped = state["pass_rows"], state["pass_dropped"]
        if state["window_number"]:
            self._cursor, self._window_number = list(state["window_start"]), state["window_number"] - 1
            self._records = self._read(DataReport())  # the records of this window were counted before
            self._fill_window()
            self._records, self._used = self._read(self.report), state["used"]
        self._restore_buffer(state)

    def _restore_buffer(self, state: dict[str, Any]) -> None:
        streams = self._reread([entry[:4] for entry in state["waiting"]])
        lengths = [entry[4] for entry in state["waiting"]]
        found = [stream for stream in streams if stream is not None]
        if len(found) < len(streams) or [len(stream) for stream in found] != lengths:
            raise DataError(f"source '{self.config.name}': the data have changed since the state was saved")
        self._buffer = sum(found, TokenStream.empty())
        self._buffer = self._buffer.split(state["skip"], self._rules.soi_token_id)[1]
        self._skip = state["skip"]
        self._waiting = deque((list(entry[:4]), entry[4]) for entry in state["waiting"])

    def _reread(self, keys: list[list[int]]) -> list[TokenStream | None]:
        """The token streams of some records, read forward once in each shard; None: the record is gone."""
        found: dict[tuple[int, ...], TokenStream] = {}
        for passes, shard, offset, line in sorted(keys, key=lambda k: k[1:]):
            try:
                record = next(iter(self.reader.shards.records(shard, offset, line)), None)
                if record is not None:
                    found[passes, shard, offset, line] = self._encode(record, passes, DataReport())
            except Rejected:
                continue  # the caller checks for it
        return [found.get(tuple(key)) for key in keys]
