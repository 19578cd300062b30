"""Generation for one JSON-lines file by any number of processes, each document exactly once.

    run.json                        what results depend on; a process with other settings is refused
    shards/00012/part.jsonl         finished documents of a shard in progress; only the process that locks it appends
    shards/00012/results.jsonl      part.jsonl of a finished shard, renamed
    shards/00012/*.png              its images
    results.jsonl                   all records in the order of the input, when all shards are finished

The lines of the file are divided into shards. A process locks a shard, generates its documents, and takes the next one
that is neither finished nor locked. Processes do not talk to each other. The operating system gives up the lock of a
process that ends for any reason, so another one takes over its shard, from the last whole batch on. Batches depend on
the file alone, so results do not depend on how many processes there were or which of them were killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..configuration import describe_differences
from ..document import Document, Folder
from ..generation import DocumentFinished, InterleavedGenerator, SegmentFinished
from ..generation.rows import PreparedDocument
from ..io import (
    InputError,
    OutputError,
    append,
    check_type,
    json_lines,
    lock_folder,
    parse_json,
    read_json,
    read_lines,
    write_json,
    writing,
)
from ..io.images import load_image
from .records import RecordWriter

RUN, SHARDS, PART, RESULTS = "run.json", "shards", "part.jsonl", "results.jsonl"
WAIT = 1.0  # seconds between two looks at shards that other processes have
Record = dict[str, Any]
Report = Callable[[int, int], None]


class SharedRun:
    """The work on one file of documents.

    Args:
        folder: the output folder, on storage that all processes share.
        source: a JSON-lines file of documents.
        about: what results depend on beside the file, see `records.describe_run`.
        shard_size: documents of a shard.
        batch_size: documents that are generated together.
        image_root: the folder that images may come from; None: that of the file.

    Raises:
        InputError: the file cannot be read, or its first line is not a JSON object.
    """

    def __init__(
        self, folder: Path, source: Path, about: Mapping[str, Any], *, shard_size: int = 64, batch_size: int = 1,
        image_root: Path | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.source, self.batch_size, self.shard_size = folder, source, batch_size, shard_size
        self._lines, digest = _index(source)
        self.run = json.loads(json.dumps({
            **about, "input": source.name, "input_sha256": digest, "documents": len(self._lines),
            "shard_size": shard_size, "batch_size": batch_size,
        }))  # fmt: skip
        base = source.resolve().parent
        limit, others = (base, ()) if image_root is None else (image_root, (image_root,))
        self._images = Folder(base, limit, (*others, Path.cwd()))

    @property
    def shards(self) -> range:
        """The numbers of the shards."""
        return range(-(-len(self._lines) // self.shard_size))

    def begin(self) -> None:
        """Create the folder, or check that it belongs to the same run.

        Raises:
            InputError: it is of another run.
            OutputError: it cannot be written.
        """
        path = self.folder / RUN
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                aside = self.folder / f".{RUN}.{os.getpid()}.{time.time_ns()}"
                write_json(aside, self.run)
                try:
                    os.link(aside, path)  # unlike a renaming, it leaves the file of another process as it is
                except FileExistsError:
                    pass
                finally:
                    aside.unlink()
        if different := describe_differences(read_json(path, dict), self.run):
            raise InputError(f"made from another input, model or settings ({different})", str(path),
                             "Repeat the command as it was, or name another folder")  # fmt: skip

    def finished(self, shard: int) -> bool:
        """Whether all documents of a shard are done."""
        return (self._shard(shard) / RESULTS).exists()

    def work(
        self, generator: InterleavedGenerator, shards: Iterable[int] | None = None, report: Report = lambda *_: None,
        locks: bool = True,
    ) -> int:  # fmt: skip
        """Finish shards, together with other processes, and wait for those that other processes have.

        Args:
            generator: generates the documents.
            shards: the numbers of the shards; None: all.
            report: called with the number of a shard that was finished here, and its number of documents.
            locks: False: no other process works on these shards, so the storage needs no locks.

        Returns:
            The number of documents that were generated here.

        Raises:
            OutputError: the storage cannot lock files, or cannot be written.
        """
        left, count = list(self.shards if shards is None else shards), 0
        while left := [shard for shard in left if not self.finished(shard)]:
            idle = True
            for shard in left:
                if self.finished(shard):
                    continue
                try:
                    with lock_folder(self._shard(shard), required=locks):
                        made = 0 if self.finished(shard) else self._finish(generator, shard)
                except OutputError as error:
                    if error.kind != "in use":
                        raise
                    continue
                idle, count = False, count + made
                report(shard, len(self._range(shard)))
            if idle:
                time.sleep(WAIT)
        return count

    def merge(self) -> Path | None:
        """Write all records into one file, once all shards are finished. Returns its path, or None before that.

        Raises:
            InputError: a shard does not have each of its documents exactly once.
        """
        path = self.folder / RESULTS
        if not all(map(self.finished, self.shards)):
            return None
        if path.exists():
            return path
        aside = self.folder / f".{RESULTS}.{os.getpid()}.{time.time_ns()}"  # several processes may do this at once
        with writing(path):
            try:
                with open(aside, "wb") as file:
                    for shard in self.shards:
                        file.write(self._checked(shard))
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)
        return path

    def problems(self) -> Iterator[tuple[int, str]]:
        """(line, problem) of the documents that could not be used; after `merge`."""
        for _, line in read_lines(self.folder / RESULTS):
            record = json.loads(line)
            if "error" in record:
                yield record["line"], record["error"]

    # ---- a shard

    def _shard(self, shard: int) -> Path:
        return self.folder / SHARDS / f"{shard:05d}"

    def _range(self, shard: int) -> range:
        """The numbers of its documents."""
        begin = shard * self.shard_size
        return range(begin, min(begin + self.shard_size, len(self._lines)))

    def _checked(self, shard: int) -> bytes:
        """The lines of a finished shard."""
        path = self._shard(shard) / RESULTS
        data = path.read_bytes()
        found = [json.loads(line)["line"] for line in data.splitlines()]
        if found != [self._lines[number][0] for number in self._range(shard)]:
            raise InputError("does not have each of its documents exactly once", str(path),
                             "Remove this file, and the same command makes it again")  # fmt: skip
        return data

    def _finish(self, generator: InterleavedGenerator, shard: int) -> int:
        """Generate what is left of a locked shard. Returns the number of documents."""
        numbers, part = self._range(shard), self._shard(shard) / PART
        done = self._resume(part)
        writer = RecordWriter(self.folder, f"{SHARDS}/{shard:05d}/")
        with open(self.source, "rb") as file:
            for begin in range(done, len(numbers), self.batch_size):
                batch = numbers[begin : begin + self.batch_size]
                append(part, json_lines(self._generate(generator, writer, batch, self._read(file, batch))))
        with writing(part):
            part.replace(part.with_name(RESULTS))
        return len(numbers) - done

    def _resume(self, part: Path) -> int:
        """Cut the records after the last whole batch, whose process was killed. Returns the number of those kept."""
        if not part.exists():
            return 0
        lines = part.read_bytes().split(b"\n")[:-1]  # a line without its end was cut short
        kept = len(lines) - len(lines) % self.batch_size
        os.truncate(part, sum(len(line) + 1 for line in lines[:kept]))
        return kept

    def _read(self, file: Any, numbers: Sequence[int]) -> list[bytes]:
        found = []
        for number in numbers:
            file.seek(self._lines[number][1])
            found.append(file.readline())
        return found

    def _generate(
        self, generator: InterleavedGenerator, writer: RecordWriter, numbers: Sequence[int], lines: Sequence[bytes]
    ) -> list[Record]:
        """The records of a batch; a document that cannot be used has a record with its `error`."""
        records: dict[int, Record] = {}
        usable: list[tuple[int, PreparedDocument]] = []
        for number, line in zip(numbers, lines, strict=True):
            name = f"line {self._lines[number][0]}"
            try:
                usable.append((number, generator.prepare(self._document(line), name)))
            except InputError as error:
                records[number] = {"error": str(error)}
        for event in generator.run([document for _, document in usable]) if usable else ():
            number = usable[event.document][0]
            if isinstance(event, SegmentFinished):
                writer.save_candidates(number, event.segment)
            elif isinstance(event, DocumentFinished):
                records[number] = writer.record(number, event.result, event.reason)
        return [{**records[number], "line": self._lines[number][0]} for number in numbers]

    def _document(self, line: bytes) -> Document:
        document = Document.from_dict(check_type(parse_json(line), dict, "the document"), self._images)
        for index, segment in enumerate(document.segments):
            for image in (getattr(segment, "source", None), getattr(segment, "target", None)):
                if image is not None:
                    load_image(image, f"segments[{index}]")
        return document


def _index(source: Path) -> tuple[list[tuple[int, int]], str]:
    """(number from 1, position in bytes) of every line that is not empty, and the SHA-256 of the file."""
    _, first = next(read_lines(source))
    try:
        check_type(parse_json(first, str(source), strict=False), dict, str(source))
    except InputError:
        raise InputError("processes can share JSON lines only, one document a line", str(source),
                         "Write it so, or leave out --shared") from None  # fmt: skip
    digest, lines, position = hashlib.sha256(), [], 0
    with open(source, "rb") as file:
        for number, line in enumerate(file, 1):
            digest.update(line)
            if line.strip():
                lines.append((number, position))
            position += len(line)
    return lines, digest.hexdigest()
