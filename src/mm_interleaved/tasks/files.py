"""Reads annotation files and finds their images. Errors state the place and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .. import io
from ..io import InputError, check_type, find_file, parse_json, read_lines

T = TypeVar("T")
Entry = tuple[str, Callable[[], Any]]
"""The place of a record, and a function that reads it or raises `InputError`, so that one bad record stops no other."""
NO_FILE = "no annotation file"  # the kind of an error
_LAYOUT = "Compare the file with the data set's layout"


@dataclass
class ImageFolder:
    """A folder of images. Names must stay in it; symbolic links in it may point anywhere."""

    root: Path
    _seen: dict[str, tuple[Path, str]] = field(default_factory=dict, repr=False)

    def find(self, name: str, *others: str) -> tuple[Path, str]:
        """The path of an image, and why it cannot be used ("": it can). Does not decode it.

        Args:
            name: its name.
            others: names that it may have instead, where releases of a data set differ.
        """
        if name not in self._seen:
            found = (found for other in (name, *others) if not (found := self._find(other))[1])
            self._seen[name] = next(found, self._find(name))
        return self._seen[name]

    def _find(self, name: str) -> tuple[Path, str]:
        root = self.root.absolute()
        try:
            return find_file(root, name), ""
        except InputError as error:
            if error.kind == "missing":
                return root / name, f"the image '{name[:200]}' is not in {self.root}; fetch it, or correct the folder"
            return root, f"the name of the image: {error.problem}; correct the annotations"


@dataclass(frozen=True)
class Source:
    """The files of a task, and the part of them to read.

    Attributes:
        task: name of the task, for messages.
        images: folder of the images.
        annotations: folder of the annotation files, or the only such file.
        phase: part of the data set, by the data set's name of it (`val`, `test`, ...).
        obtain: where to get the files, for messages.
        options: the task's own settings.
        limit: maximum number of samples; None: all.
        seed: seed of random choices.
        compat: whether to restore the original's quirks (docs/data_formats.md, "Quirks of the original's tasks").
        blind: whether the phase has no published answers.
        training: whether the items become training documents, so that what their `vary` makes may be missing.
    """

    task: str
    images: ImageFolder
    annotations: Path
    phase: str = ""
    obtain: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0
    compat: bool = False
    blind: bool = False
    training: bool = False
    _asked: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def file(self, name: str, *others: str) -> Path:
        """The annotation file of that name; if `annotations` is a file, that file.

        Args:
            name: its name.
            others: names that it may have instead, where releases of a data set differ.

        Raises:
            InputError: it does not exist, or `annotations` is a file and the task needs several.
        """
        if self.annotations.is_file():
            self._asked.extend(() if name in self._asked else [name])
            if len(self._asked) > 1:
                raise InputError(f"task '{self.task}' needs {' and '.join(self._asked)}, and this is one file",
                                 str(self.annotations), "Give the folder of both", NO_FILE)  # fmt: skip
            return self.annotations
        paths = [self.annotations / other for other in (name, *others)]
        path = next((path for path in paths if path.is_file()), paths[0])
        if not path.is_file():
            why = "and this is a folder" if path.is_dir() else "which does not exist"
            raise InputError(f"task '{self.task}' needs this file, {why}", str(path), self.obtain, NO_FILE)
        return path


def read_json(path: Path) -> Any:
    """The value of an official JSON file. Its strings are not checked here but for each sample.

    Raises:
        InputError: it cannot be read.
    """
    return io.read_json(path, strict=False)


def line_entries(path: Path) -> Iterator[Entry]:
    """The lines of a JSON-lines file, which must be objects; empty lines are skipped.

    Raises:
        InputError: the file cannot be read, or has no lines.
    """
    for where, line in read_lines(path):
        yield where, partial(_line, line, where)


def _line(line: bytes, where: str) -> dict[str, Any]:
    return checked(parse_json(line, where, strict=False), dict, where)


def checked(value: Any, kind: type[T], where: str) -> T:
    """Return `value`, which must be of that JSON type.

    Raises:
        InputError: it is of another type.
    """
    return check_type(value, kind, where, _LAYOUT)


def get(record: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    """The value of a key, which must be of that JSON type.

    Raises:
        InputError: the key is missing, or its value is of another type.
    """
    if key not in record:
        raise InputError(f"'{key}' is missing; there is {', '.join(record) or 'nothing'}", where, _LAYOUT)
    return checked(record[key], kind, f"{where}, '{key}'")


def entries(value: Any, where: str, kind: type = dict) -> Iterator[Entry]:
    """The items of a list, which must be objects, or of another JSON type.

    Raises:
        InputError: it is not a list, or it is empty.
    """
    if not checked(value, list, where):
        raise InputError("the list is empty", where, "Fetch or make the file again")
    for index, item in enumerate(value):
        place = f"{where}, record {index}"
        yield place, partial(checked, item, kind, place)


def records(value: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) for every item of a list of objects.

    Raises:
        InputError: it is not a list, it is empty, or an item is not an object.
    """
    for place, read in entries(value, where):
        yield place, read()


def strings(value: Any, where: str) -> list[str]:
    """Return `value`, which must be a list of strings, at least one of them not blank.

    Raises:
        InputError: it is not.
    """
    texts = [checked(item, str, f"{where}[{i}]") for i, item in enumerate(checked(value, list, where))]
    if not any(text.strip() for text in texts):
        raise InputError("there is no reference, or only blank ones", where, "Complete the file, or remove the sample")
    return texts


def trailing_number(name: str, where: str) -> int:
    """The number at the end of a file's name: 7 for `val2014/COCO_val2014_000000000007.jpg`.

    Raises:
        InputError: the name does not end in a number.
    """
    digits = Path(name).stem.rsplit("_", 1)[-1]
    if not (digits.isascii() and digits.isdigit()):
        raise InputError(
            f"the name '{name}' does not end in a number, which would be the id", where, "Correct the name"
        )
    return int(digits)


def box(value: Any, where: str) -> tuple[float, float, float, float]:
    """A box (x1, y1, x2, y2) in pixels.

    Raises:
        InputError: it does not have four numbers, or x1 > x2 or y1 > y2.
    """
    sides = [checked(item, float, f"{where}[{i}]") for i, item in enumerate(checked(value, list, where))]
    if len(sides) != 4 or sides[0] > sides[2] or sides[1] > sides[3]:
        raise InputError(f"{value} is no box", where, "Write [x1, y1, x2, y2] in pixels with x1 <= x2 and y1 <= y2")
    x1, y1, x2, y2 = sides
    return x1, y1, x2, y2
