"""Files of documents, and where the pictures that they name may lie."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from .checks import check
from .data import Document, DocumentError


@dataclass(frozen=True)
class Folder:
    """Where the relative paths of a file start, and the folder that no path may leave.

    Attributes:
        base: the folder of the file; None: paths are taken as they are and not checked.
        limit: the folder that paths must stay in; None: `base`.
    """

    base: Path | None = None
    limit: Path | None = None

    def picture(self, text: Any, where: str) -> Path | PIL.Image.Image:
        """The picture that `text` names: the path of an existing file, or the picture of a data URL.

        Raises:
            DocumentError: there is no such file, or it lies outside the folder, or the URL is not a data URL.
        """
        text = check(text, str, where, "Give the path of a picture, or null for a slot to fill")
        if text.startswith("data:"):
            return _inline_picture(text, where)
        if "://" in text:
            raise DocumentError(f"'{text}' is a URL", where, "Pictures are not fetched; download it and give its path")
        if "\0" in text:
            raise DocumentError("the path holds a null character", where, "Remove it")
        if self.base is None:
            return Path(text)
        try:
            path, limit = (self.base / text).resolve(), (self.limit or self.base).resolve()
            there = path.is_file()
        except (OSError, RuntimeError) as error:  # a name that is too long; links that go round in circles
            reason = getattr(error, "strerror", None) or "its links go round in circles"
            raise DocumentError(f"'{text[:60]}...' is no path: {reason}", where, "Check the path") from None
        if not path.is_relative_to(limit):
            raise DocumentError(
                f"'{text}' lies outside the folder {limit}", where,
                "Move the picture there, or allow a wider folder with --image-root",
            )  # fmt: skip
        if not there:
            raise DocumentError(f"the file '{text}' does not exist", where, f"Paths are relative to {self.base}")
        return path


def load_documents(path: str | Path, image_root: str | Path | None = None) -> list[Document]:
    """The documents of a JSON or JSON-lines file.

    Args:
        path: one document, a list of documents, or one document a line.
        image_root: the folder that pictures must stay in; None: the folder of the file, where paths start
            in any case.

    Raises:
        DocumentError: the file is missing, empty or not JSON, or a document in it cannot be used. It names the record
            (or line), the field and the fix.
    """
    path = Path(path)
    folder = Folder(path.resolve().parent, Path(image_root) if image_root is not None else None)
    documents = []
    for place, data in _read_json(path):
        try:
            document = Document.from_dict(data, folder)
        except DocumentError as error:
            raise error.at(place) from None
        document.place = place
        documents.append(document)
    return documents


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, decoded record) for every record of a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(f"not UTF-8 text (byte {error.start})", str(path), "Save the file as UTF-8") from None
    except OSError as error:
        raise DocumentError(f"cannot be read: {error.strerror}", str(path)) from None
    if not text.strip():
        raise DocumentError("the file is empty", str(path), 'Write {"segments": [{"text": ...}, {"image": "path"}]}')
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    by_line = path.suffix == ".jsonl" or (len(lines) > 1 and _is_json_object(lines[0][1]))
    if by_line:
        for number, line in lines:
            yield f"{path}, line {number}", _decode(line, f"{path}, line {number}")
        return
    data = _decode(text, str(path))
    if not isinstance(data, list):
        yield str(path), data
        return
    if not data:
        raise DocumentError("the list of documents is empty", str(path))
    for index, record in enumerate(data):
        yield f"{path}, record {index}", record


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DocumentError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}", where) from None
    except RecursionError:
        raise DocumentError("the JSON is nested too deeply", where) from None
    except ValueError:  # Python reads no whole number of thousands of digits
        raise DocumentError("a number is too long to be read", where, "Shorten it, or put it in quotes") from None


def _inline_picture(url: str, where: str) -> PIL.Image.Image:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise DocumentError("the data URL is not base64", where, "Write data:image/png;base64,...")
    try:
        return PIL.Image.open(io.BytesIO(base64.b64decode(payload, validate=True)))
    except (ValueError, OSError, SyntaxError, PIL.Image.DecompressionBombError):  # what base64 and PIL's readers raise
        raise DocumentError("the data URL holds no picture that can be read", where,
                            "Write data:image/png;base64,... with all of a PNG or JPEG") from None  # fmt: skip
