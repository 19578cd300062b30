"""Annotation files and the images beside them: read with care, and with errors that say where and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from ..document import DocumentError

T = TypeVar("T")
Entry = tuple[str, Callable[[], Any]]
"""Where a record of a file stands, and what reads it or raises `TaskError`: one odd record leaves the others alone."""
_NAMES = {dict: "an object", list: "a list", str: "a string", int: "a whole number", float: "a number"}
_NUMBER = (int, float)


class TaskError(DocumentError):
    """A task whose settings or files cannot be used: what is wrong, where (file, record, key), and what to do."""


@dataclass
class ImageFolder:
    """A folder of images, which no name may leave."""

    root: Path
    _seen: dict[str, tuple[Path, str]] = field(default_factory=dict, repr=False)

    def find(self, name: str) -> tuple[Path, str]:
        """The path of an image, and why it cannot be used ("": it can). Nothing is decoded."""
        if name not in self._seen:
            self._seen[name] = self._find(name)
        return self._seen[name]

    def _find(self, name: str) -> tuple[Path, str]:
        root = self.root.resolve()
        if not name or "\0" in name:
            return root, f"the image's name {name!r} is no path; correct the annotations"
        try:
            path = (root / name).resolve()
            if not path.is_relative_to(root):
                return root, f"the image '{name}' lies outside {self.root}; move it there"
            if path.is_file():
                return path, ""
        except (OSError, RuntimeError):  # a name that is too long; links that go round in circles
            return root, f"the image's name '{name[:60]}...' leads nowhere; correct the annotations"
        return path, f"the image '{name}' is not in {self.root}; fetch it, or correct the folder of images"


@dataclass(frozen=True)
class Source:
    """Where a task's files are, and which part of them is wanted.

    Attributes:
        task: for messages.
        images: folder of the images.
        annotations: folder of the annotation files, or for tasks with one such file the file itself.
        phase: part of the data set, in its own words (`val`, `test`, ...).
        obtain: where the files come from, for messages.
        options: the task's own settings.
        limit: most samples; None: all.
        seed: of what is drawn.
        compat: whether to restore the original's quirks (docs/data_formats.md, "Quirks of the original's tasks").
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

    def file(self, name: str) -> Path:
        """The annotation file of that name, or the one file that `annotations` is.

        Raises:
            TaskError: it does not exist.
        """
        path = self.annotations if self.annotations.is_file() else self.annotations / name
        if not path.is_file():
            raise TaskError(f"task '{self.task}' needs this file, which does not exist", str(path), self.obtain)
        return path


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        TaskError: it cannot be read.
    """
    return _decode(_text(path), str(path))


def line_entries(path: Path) -> Iterator[Entry]:
    """The lines of a JSON-lines file, which are to be objects; empty lines are skipped.

    Raises:
        TaskError: the file cannot be read, or has no lines.
    """
    found = False
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            found = True
            where = f"{path}, line {number}"
            yield where, partial(_line, line, where)
    if not found:
        raise TaskError("the file is empty", str(path), "Fetch or make it again")


def _line(text: str, where: str) -> dict[str, Any]:
    return checked(_decode(text, where), dict, where)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"not UTF-8 text (byte {error.start})", str(path), "Fetch or convert it again") from None
    except OSError as error:
        raise TaskError(f"cannot be read: {error.strerror}", str(path)) from None


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise TaskError(problem, where, "The file may be cut short; fetch or make it again") from None
    except (RecursionError, ValueError):  # nested too deeply; a number of thousands of digits
        raise TaskError("JSON that cannot be read", where, "Fetch or make it again") from None


def checked(value: Any, kind: type[T], where: str) -> T:
    """`value`, which must be of that JSON type; a whole number is a number, true and false are none.

    Raises:
        TaskError: it is of another type.
    """
    wanted: type | tuple[type, ...] = _NUMBER if kind is float else kind
    if not isinstance(value, wanted) or (kind in _NUMBER and isinstance(value, bool)):
        found = "null" if value is None else _NAMES.get(type(value), type(value).__name__)
        raise TaskError(f"must be {_NAMES[kind]}, not {found}", where, "Compare the file with the data set's layout")
    return cast(T, value)


def get(record: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    """The value under a key, of a JSON type.

    Raises:
        TaskError: there is no such key, or its value is of another type.
    """
    if key not in record:
        raise TaskError(f"'{key}' is missing; there is {', '.join(record) or 'nothing'}", where,
                        "Compare the file with the data set's layout")  # fmt: skip
    return checked(record[key], kind, f"{where}, '{key}'")


def entries(value: Any, where: str, kind: type = dict) -> Iterator[Entry]:
    """The items of a list, which are to be objects, or of another JSON type.

    Raises:
        TaskError: it is no list, or empty.
    """
    if not checked(value, list, where):
        raise TaskError("the list is empty", where, "Fetch or make the file again")
    for index, item in enumerate(value):
        place = f"{where}, record {index}"
        yield place, partial(checked, item, kind, place)


def records(value: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, object) for every item of a list of objects.

    Raises:
        TaskError: it is no list, or empty, or an item is no object.
    """
    for place, read in entries(value, where):
        yield place, read()


def strings(value: Any, where: str) -> list[str]:
    """A list of strings, at least one of them not blank.

    Raises:
        TaskError: it is not.
    """
    texts = [checked(item, str, f"{where}[{i}]") for i, item in enumerate(checked(value, list, where))]
    if not any(text.strip() for text in texts):
        raise TaskError("there is no reference, or only blank ones", where, "Complete the file, or remove the sample")
    return texts


def trailing_number(name: str, where: str) -> int:
    """The number at the end of a file's name: 7 for `val2014/COCO_val2014_000000000007.jpg`.

    Raises:
        TaskError: there is none.
    """
    digits = Path(name).stem.rsplit("_", 1)[-1]
    if not (digits.isascii() and digits.isdigit()):
        raise TaskError(f"the name '{name}' does not end in a number, which would be the id", where, "Correct the name")
    return int(digits)


def box(value: Any, where: str) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 in pixels.

    Raises:
        TaskError: not four numbers, or its ends are the wrong way round.
    """
    sides = [checked(item, float, f"{where}[{i}]") for i, item in enumerate(checked(value, list, where))]
    if len(sides) != 4 or sides[0] > sides[2] or sides[1] > sides[3]:
        raise TaskError(f"{value} is no box", where, "Write [x1, y1, x2, y2] in pixels with x1 <= x2 and y1 <= y2")
    x1, y1, x2, y2 = sides
    return x1, y1, x2, y2
