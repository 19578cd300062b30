"""Files of records: JSON lines (plain, gzip or zip) and tar archives, read from any offset."""

from __future__ import annotations

import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from ..io import MAX_LINE, FileSlice
from .report import DataError, Rejected
from .stores import Store

DAMAGE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, NotImplementedError, RuntimeError)
SUFFIXES = ("", ".zip", ".gz")  # that a file of lines may have after its name
LISTED, READ, PART = 4096, 64, 2**20  # files, files and bytes of a digest
_SAMPLE_FILE = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_SPACE = re.compile(r"[ \t\r\n]*")
_BRACES = re.compile(r"\{([^{}]*)\}")


class Record(NamedTuple):
    """One record of a shard.

    Attributes:
        shard: number of the shard.
        offset: its start in the (unpacked) shard.
        line: its number in the shard, from 0.
        end: the start of the next record.
        payload: a line in bytes, or for tar shards a `TarSample`.
    """

    shard: int
    offset: int
    line: int
    end: int
    payload: Any


class Shards(Protocol):
    """A sequence of files of records."""

    names: Sequence[str]

    def records(self, shard: int, offset: int = 0, line: int = 0) -> Iterator[Record]:
        """The records of a shard from `offset` on.

        Raises:
            Rejected: the shard is missing, or damaged from here on.
        """
        ...

    def place(self, record: Record) -> str:
        """The place of a record, for messages."""
        ...


class NumberedRecords:
    """Shards of a source without files, whose records are the numbers from 0.

    Args:
        name: of the shards, for messages.
        count: how many records a pass has.
        size: how many records a shard has; None: all are in one.
    """

    def __init__(self, name: str, count: int, size: int | None = None) -> None:
        self.name, self.count, self.size = name, count, size or max(count, 1)
        self.names: Sequence[str] = [name] * max(-(-count // self.size), 1)

    def place(self, record: Record) -> str:
        """Name and number."""
        return f"{self.name}, document {record.payload}"

    def records(self, shard: int, offset: int = 0, line: int = 0) -> Iterator[Record]:
        """Numbers of the shard from its `offset` on."""
        first = shard * self.size
        return (Record(shard, n, n, n + 1, first + n) for n in range(offset, min(self.size, self.count - first)))


def digest(parts: Iterable[bytes]) -> str:
    """A digest of data, which tells a resumed run whether they have changed."""
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()[:16]


def digest_files(names: Sequence[str], find: Callable[[str], Path | None]) -> str:
    """A digest of files that takes little time for any number of any size.

    It has the names and sizes of up to `LISTED` files, and of up to `READ` of these the content: all of a small file,
    the beginning and the end of a large one. It has no times, which a copy of the same data changes.

    Args:
        names: the names of the files.
        find: the path of the file of a name; None: it is missing.
    """
    step, inner = -(-len(names) // LISTED) or 1, -(-min(len(names), LISTED) // READ) or 1
    parts: list[bytes] = []
    for index, name in enumerate(names[::step]):
        path = find(name)
        size = -1 if path is None else path.stat().st_size
        parts.append(f"{name} {size}".encode())
        if path is not None and index % inner == 0:
            with path.open("rb") as file:
                parts.append(file.read(PART if size > 2 * PART else size))
                if size > 2 * PART:
                    file.seek(-PART, os.SEEK_END)
                    parts.append(file.read(PART))
    return digest(parts)


def digest_stored(store: Store, names: Sequence[str], suffixes: Sequence[str] = ("",)) -> str:
    """A digest of files in a store, which fetches none: the names, and the sizes of up to `READ` of them.

    Args:
        store: their folder.
        names: the names of the files.
        suffixes: what may follow a name; the first that the store has counts.
    """
    step = -(-len(names) // READ) or 1
    sizes = [next(filter(None, (store.size(name + suffix) for suffix in suffixes)), -1) for name in names[::step]]
    return digest([*(name.encode() for name in names), repr(sizes).encode()])


def locate(root: Path | Store, name: str) -> Path | None:
    """The file of this name, of a store its local copy; None: there is none."""
    if isinstance(root, Store):
        return root.fetch(name)
    path = root / name
    return path if path.is_file() else None


def expand(pattern: str, root: Path | Store) -> list[str]:
    """The names that a pattern stands for: `{0..12}`, `{007..120}`, `{a,b}`, and `*`, `?` for files that exist.

    Raises:
        DataError: wild cards that no file matches.
    """
    parts = _BRACES.split(pattern)
    choices = [_choices(part) if index % 2 else [part] for index, part in enumerate(parts)]
    names = ["".join(combination) for combination in itertools.product(*choices)]
    if not any(c in pattern for c in "*?"):
        return names
    if isinstance(root, Store):
        found = sorted({f for name in names for f in root.glob(name)})
    else:
        found = sorted({f for name in names for f in glob.glob(name, root_dir=root)})
    if not found:
        raise DataError(f"no file in {root} matches '{pattern}'")
    return found


def _choices(text: str) -> list[str]:
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        first, last = match.groups()
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        return [str(n).zfill(width) for n in range(int(first), int(last) + 1)]
    return text.split(",") if "," in text else ["{" + text + "}"]


class LineShards:
    """JSON lines, one record a line. The file of `NAME` may be `NAME`, `NAME.gz` or `NAME.zip`.

    Args:
        root: folder of the shards, here or in a store.
        names: their names.
    """

    def __init__(self, root: Path | Store, names: Sequence[str]) -> None:
        self.root, self.names = root, names

    def place(self, record: Record) -> str:
        """File and line."""
        return f"{self.names[record.shard]}, line {record.line + 1}"

    def records(self, shard: int, offset: int = 0, line: int = 0) -> Iterator[Record]:
        """Non-empty lines from `offset` on; raises `Rejected` for a missing file, or where damage starts."""
        with _guard(self.names[shard]), _open(self._path(shard)) as file:
            file.seek(offset)
            while text := file.readline(MAX_LINE):
                start, offset = offset, offset + len(text)
                while text and not text.endswith(b"\n") and len(text) == MAX_LINE:
                    text = file.readline(MAX_LINE)  # skip to its end: a cut line is not JSON
                    offset += len(text)
                if text.strip():
                    yield Record(shard, start, line, offset, text)
                line += 1

    @cached_property
    def digest(self) -> str:
        """A digest of the files, see `digest_files`."""
        if isinstance(self.root, Store):
            return digest_stored(self.root, self.names, SUFFIXES)
        return digest_files(self.names, self._found)

    def _path(self, shard: int) -> Path:
        if (found := self._found(self.names[shard])) is not None:
            return found
        raise Rejected("shard missing", f"{self.root}/{self.names[shard]}")

    def _found(self, name: str) -> Path | None:
        """The first of the files that may be meant."""
        paths = (locate(self.root, name + suffix) for suffix in SUFFIXES)
        return next((path for path in paths if path is not None), None)


class TarSample(NamedTuple):
    """Neighbouring files of one stem in a tar archive.

    Attributes:
        files: the slices of the archive that hold the files, by lower-case extension (`jpg`, `txt`, `json`).
        skipped: names of files from here to the next sample that belong to none.
        twice: a name that ends like another of the sample; "": none.
    """

    files: dict[str, FileSlice]
    skipped: list[str]
    twice: str = ""


class TarShards:
    """Tar archives, read by webdataset's rules: neighbouring files with one stem are a sample.

    The stem ends at the first dot after the last slash. Names without an extension and `__meta__` files belong to no
    sample, nor do files whose names begin with a dot, as a Mac adds them. Two files of one name spoil their sample.
    """

    def __init__(self, root: Path | Store, names: Sequence[str]) -> None:
        self.root, self.names = root, names

    @cached_property
    def digest(self) -> str:
        """A digest of the files, see `digest_files`."""
        root = self.root
        return (
            digest_stored(root, self.names)
            if isinstance(root, Store)
            else digest_files(self.names, lambda name: locate(root, name))
        )

    def place(self, record: Record) -> str:
        """File and number of the sample."""
        return f"{self.names[record.shard]}, sample {record.line}"

    def records(self, shard: int, offset: int = 0, line: int = 0) -> Iterator[Record]:
        """Samples from `offset` on; raises `Rejected` for a missing file, or where damage starts."""
        name, root = self.names[shard], self.root
        path = locate(root, name)
        if path is None:
            raise Rejected("shard missing", f"{root}/{name}")
        if offset >= path.stat().st_size > 0:
            return
        start, stem, sample = offset, "", TarSample({}, [])
        with _guard(self.names[shard]), _open_tar(path, offset) as archive:
            for member in archive:
                if not member.isreg():
                    continue
                match = _SAMPLE_FILE.fullmatch(member.name)
                if not match or _META.search(member.name):
                    sample.skipped.append(member.name)
                    continue
                if sample.files and match[1] != stem:
                    yield Record(shard, start, line, member.offset, sample)
                    start, line, sample = member.offset, line + 1, TarSample({}, [])
                stem, extension = match[1], match[2].lower()
                if extension in sample.files:
                    sample = sample._replace(twice=member.name)
                place = (member.offset_data, member.size)
                sample.files[extension] = (
                    root.piece(name, *place) if isinstance(root, Store) else FileSlice(path, *place)
                )
            if sample.files or sample.skipped:
                yield Record(shard, start, line, path.stat().st_size, sample)


@contextmanager
def _guard(name: str) -> Iterator[None]:
    """Turn errors of a damaged file into `Rejected`."""
    try:
        yield
    except DAMAGE as error:
        raise Rejected("shard damaged", f"{name}: {str(error) or type(error).__name__}") from None


@contextmanager
def _open_tar(path: Path, offset: int) -> Iterator[tarfile.TarFile]:
    with path.open("rb") as file:
        file.seek(offset)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            yield archive


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            yield file
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            named = [m for m in members if m.filename == path.name.removesuffix(".zip")]
            if not named and len(members) != 1:
                raise zipfile.BadZipFile(f"holds {len(members)} files, none of them '{path.name.removesuffix('.zip')}'")
            with archive.open((named or members)[0]) as file:
                yield file
    else:
        with path.open("rb") as file:
            yield file


class RecordFiles(LineShards):
    """JSON lines as in `LineShards`, and files with one JSON list, whose items are the records.

    A list is a file `.json` that begins with `[`. It is scanned once for the places of its items, and these are read
    when they are needed.
    """

    def __init__(self, root: Path | Store, names: Sequence[str]) -> None:
        super().__init__(root, names)
        self._places: dict[int, list[tuple[int, int]] | None] = {}

    def place(self, record: Record) -> str:
        """File and line, or number of the record in a list."""
        if self._places.get(record.shard) is None:
            return super().place(record)
        return f"{self.names[record.shard]}, record {record.line}"

    def records(self, shard: int, offset: int = 0, line: int = 0) -> Iterator[Record]:
        """Records from `offset` on, which is that of `line`; raises `Rejected` as `LineShards.records`."""
        with _guard(self.names[shard]):
            places = self._list_places(shard)
        if places is None:
            yield from super().records(shard, offset, line)
            return
        with _guard(self.names[shard]), self._path(shard).open("rb") as file:
            for number in range(line, len(places)):
                start, end = places[number]
                file.seek(start)
                yield Record(shard, start, number, end, file.read(end - start))

    def count(self) -> int:
        """The number of records of all shards that can be read."""
        total = 0
        for shard in range(len(self.names)):
            try:
                with _guard(self.names[shard]):
                    places = self._list_places(shard)
                    total += sum(1 for _ in super().records(shard)) if places is None else len(places)
            except Rejected:
                continue  # it is counted as missing or damaged when it is read
        return total

    def _list_places(self, shard: int) -> list[tuple[int, int]] | None:
        """Where the items of a list start and end, in bytes; None: the file has lines."""
        if shard not in self._places:
            path = self._path(shard)
            self._places[shard] = _item_places(path.read_bytes()) if path.suffix == ".json" else None
        return self._places[shard]


def _item_places(data: bytes) -> list[tuple[int, int]] | None:
    """Where the items of a JSON list start and end, in bytes; None: the data are no list.

    Raises:
        OSError: the list is damaged.
    """
    if not data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise OSError(f"byte {error.start} is not UTF-8") from None
    scan = json.JSONDecoder().raw_decode
    places: list[tuple[int, int]] = []
    position = _after_space(text, text.index("[") + 1)
    while text[position : position + 1] != "]":
        try:
            _, end = scan(text, position)
        except (ValueError, RecursionError) as error:
            raise OSError(f"the list is no JSON from item {len(places)} on: {error}") from None
        places.append((position, end))
        position = _after_space(text, end)
        if text[position : position + 1] == ",":
            position = _after_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise OSError(f"the list ends after item {len(places) - 1}")
    if _after_space(text, position + 1) < len(text):
        raise OSError("there is more after the end of the list")
    return places if len(text) == len(data) else _in_bytes(text, places)


def _after_space(text: str, position: int) -> int:
    """The position of the next character that is no white space."""
    found = _SPACE.match(text, position)
    return position if found is None else found.end()


def _in_bytes(text: str, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Places in the UTF-8 form of a text."""
    done, at = 0, 0
    found: list[tuple[int, int]] = []
    for start, end in places:
        first = at + len(text[done:start].encode())
        at = first + len(text[start:end].encode())
        found.append((first, at))
        done = end
    return found
