"""A folder of images with texts about them, as Hugging Face's `imagefolder` has it.

The layout: docs/data_formats.md, "Image folders".
"""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..document import Document, Image, Segment, Text
from ..io import InputError, read_lines, read_text
from ..tasks import render
from ..validation import settings, short
from .config import SourceConfig
from .readers import IMAGES, ImageFolder, Note, decode, folders, kind_of
from .report import DataError, Rejected
from .shards import NumberedRecords, Record, digest
from .sources import SourceType
from .task_source import SHARD_SIZE

COLUMNS = ("text", "caption")  # where the text is looked for
METADATA = ("metadata.jsonl", "metadata.csv")
Entry = tuple[str, dict[str, Any] | bytes]  # the place of a record, and the record or its line


@settings
class ImageFolderOptions:
    """Options of a source of type `imagefolder`.

    Attributes:
        learn: what is learned: the `text` about an image, the `image` of a text, or in each document one of the two.
        column: the column of the text; "": `text`, or else `caption`.
        prompt: template of what precedes a learned text, with `{image}` and any column of the metadata; of several,
            each document has one at random.
        image_prompt: template of what precedes a learned image, with `{text}` and any column; or several.
    """

    learn: Literal["text", "image", "either"] = "image"
    column: str = ""
    prompt: str | list[str] = "{image}"
    image_prompt: str | list[str] = "{text}"

    def __post_init__(self) -> None:
        for name in ("prompt", "image_prompt"):
            if getattr(self, name) == []:
                raise ValueError(f"'{name}' is an empty list; write one template or several")


class ImageFolderReader:
    """Reader of an image folder; see `data.readers.Reader`.

    Args:
        config: settings of the source.
        options: what is learned, and the templates.
        folder: the folder that the source's `root` starts from.

    Raises:
        DataError: there is no such folder, or no file of metadata and no image with a text in it.
    """

    crop = None

    def __init__(self, config: SourceConfig, options: ImageFolderOptions, folder: Path) -> None:
        root, images = folders(config, folder)
        self.options, self.images = options, ImageFolder(images.root, config.probe_images)
        try:
            self.entries = _entries(root)
        except InputError as error:
            raise DataError(f"source '{config.name}': {error}") from None
        self.size = len(self.entries)
        self.digest = digest(r if isinstance(r, bytes) else repr(r).encode() for _, r in self.entries)
        self.shards = NumberedRecords(config.name, self.size, SHARD_SIZE)

    def document(self, record: Record, rng: np.random.Generator, note: Note) -> Document:
        """A prompt with the image and its text to learn, or with the text and its image to learn."""
        where, entry = self.entries[record.payload]
        data = decode(entry, where) if isinstance(entry, bytes) else entry
        if data.get("file_name") is None:
            raise Rejected("'file_name' missing", f"{where}: there is {', '.join(map(str, data))}")
        path, text = self.images.find(data["file_name"], where), self._text(data, where)
        fields = {name: str(value) for name, value in data.items() if isinstance(value, str | int | float)}
        learn = self.options.learn if self.options.learn != "either" else ("text", "image")[int(rng.integers(2))]
        templates = self.options.prompt if learn == "text" else self.options.image_prompt
        templates = [templates] if isinstance(templates, str) else templates
        template = templates[int(rng.integers(len(templates)))] if len(templates) > 1 else templates[0]
        shown = {"image": Image(path, supervise=False)} if learn == "text" else {"text": text}
        answer: Segment = Text(text) if learn == "text" else Image(path)
        try:
            return Document([*render(template, fields | shown, ""), answer], place=where)
        except InputError as error:
            raise Rejected(kind_of(error.problem), f"{where}: {error}") from None

    def _text(self, data: dict[str, Any], where: str) -> str:
        column = self.options.column or next((name for name in COLUMNS if name in data), COLUMNS[0])
        text = data.get(column)
        if text is None:
            raise Rejected(f"'{column}' missing", f"{where}: there is {', '.join(map(str, data))}")
        if not isinstance(text, str):
            raise Rejected(f"'{column}' malformed", f"{where}: {short(text)} is no text; write it in quotes")
        if not text.strip():
            raise Rejected(f"'{column}' blank", where)
        return text.strip()


def _entries(root: Path) -> list[Entry]:
    """The records of the metadata, or the images that have a text file of the same name.

    Raises:
        InputError: there is neither, or the metadata cannot be read.
    """
    lines, table = (root / name for name in METADATA)
    if lines.is_file():
        return list(read_lines(lines))
    if table.is_file():
        rows = csv.DictReader(StringIO(read_text(table), newline=""))
        return [(f"{table}, line {rows.line_num}", dict(row)) for row in rows]
    suffixes = {f".{name}" for name in IMAGES}
    files = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in suffixes]
    found: list[Entry] = []
    for image in files:
        if (text := image.with_suffix(".txt")).is_file():
            found.append((str(text), {"file_name": image.relative_to(root).as_posix(), "text": read_text(text)}))
    if not found:
        below = sorted({path.parent.name for name in METADATA for path in root.glob(f"*/{name}")})
        fix = f"Name one of its folders: {', '.join(below)}" if below else (
            'Write metadata.jsonl with a line {"file_name": "0.png", "text": "..."} for each image'
        )  # fmt: skip
        raise InputError("there is no metadata.jsonl and no metadata.csv, and no image has a .txt of its name",
                         str(root), fix)  # fmt: skip
    return found


TYPE = SourceType(ImageFolderReader, ImageFolderOptions, has_files=False, samples=True)
