"""Files of documents."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from ..io import InputError, parse_json, read_text
from .document import Document
from .folder import Folder

_EXAMPLE = 'Write {"segments": [{"text": ...}, {"image": "path"}]}'


def load_documents(
    path: str | Path, image_root: str | Path | None = None, look_in: Sequence[Path] = ()
) -> list[Document]:
    """The documents of a JSON or JSON-lines file.

    Args:
        path: a file with one document, a list of documents, or one document per line.
        image_root: the folder that images must stay in; None: the folder of the file. Paths are relative to the folder
            of the file, or else to `image_root`.
        look_in: further folders that relative paths may be relative to, and must then stay in.

    Raises:
        InputError: the file is missing, empty or not JSON, or a document in it cannot be used. It names the record
            (or line), the field and the fix.
    """
    path = Path(path)
    base = path.resolve().parent
    limit, others = (base, ()) if image_root is None else (Path(image_root), (Path(image_root),))
    folder = Folder(base, limit, (*others, *look_in))
    documents: list[Document] = []
    for place, data in _read_records(path):
        try:
            document = Document.from_dict(data, folder)
        except InputError as error:
            raise error.at(place) from None
        document.place = place
        documents.append(document)
    return documents


def _read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, parsed record) for every record of a file."""
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError("the file is empty", str(path), _EXAMPLE)
    if path.suffix == ".jsonl" or (len(lines) > 1 and _is_json_object(lines[0][1])):
        for number, line in lines:
            yield f"{path}, line {number}", parse_json(line, f"{path}, line {number}")
        return
    data = parse_json(_without_comments(text), str(path))
    if not isinstance(data, list):
        yield str(path), data
        return
    if not data:
        raise InputError("the list of documents is empty", str(path), _EXAMPLE)
    for index, record in enumerate(cast(list[Any], data)):
        yield f"{path}, record {index}", record


def _without_comments(text: str) -> str:
    """JSON without the `// ...` comments that the original's examples have; strings keep theirs."""
    return re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*', lambda found: found[1] or "", text)


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line, strict=False), dict)
    except InputError:
        return False
