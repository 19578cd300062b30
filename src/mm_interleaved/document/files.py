"""Files of documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from .document import Document
from .errors import DocumentError
from .folder import Folder


def load_documents(path: str | Path, image_root: str | Path | None = None) -> list[Document]:
    """The documents of a JSON or JSON-lines file.

    Args:
        path: one document, a list of documents, or one document a line.
        image_root: the folder that images must stay in; None: the folder of the file, where paths start
            in any case.

    Raises:
        DocumentError: the file is missing, empty or not JSON, or a document in it cannot be used. It names the record
            (or line), the field and the fix.
    """
    path = Path(path)
    folder = Folder(path.resolve().parent, Path(image_root) if image_root is not None else None)
    documents: list[Document] = []
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
    for index, record in enumerate(cast(list[Any], data)):
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
