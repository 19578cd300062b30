"""Documents: text and pictures in the order in which one reads them. Plain data; no tensors.

    Document([Text("A cat."), Image("cat.png"), Text("The same cat asleep:"), Image()])

A segment without content is an open slot, which generation fills. Documents come from JSON in three forms; a file holds
one document, a list of them, or one a line:

    {"segments": [{"text": "A cat."}, {"image": "cat.png"}, {"text": "The same cat asleep:"}, {"image": null}]}
    {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "Who?"}]}]}
    {"sentences": [...], "images": [...], "sentence_ixs": [...], "image_first": [...], ...}     the original's record

Paths are relative to the file and may not lead out of its folder; `data:image/...;base64,` URLs carry a picture inline.
"""

from __future__ import annotations

import base64
import difflib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

ROLES = ("system", "user", "assistant")
SEGMENT_FIELDS = ("text", "image", "supervise", "role", "attached", "target")
DOCUMENT_FIELDS = ("segments", "id", "max_turns", "forced_texts", "stop_at_eos")
RECORD_FIELDS = (
    "sentences", "images", "sentence_ixs", "image_first", "generate_mode", "num_iter", "multiround_context", "id",
)  # fmt: skip


ORIGINAL_TURNS = 2  # what the original makes of a record that does not say how many turns


class DocumentError(ValueError):
    """A document that cannot be used: what is wrong, where, and what to do about it."""

    def __init__(self, problem: str, where: str = "", fix: str = "") -> None:
        self.problem, self.where, self.fix = problem, where, fix
        super().__init__(f"{where + ': ' if where else ''}{problem}{'. ' + fix if fix else ''}")

    def at(self, place: str) -> DocumentError:
        """The same error, seen from further out."""
        return DocumentError(self.problem, f"{place}, {self.where}" if self.where else place, self.fix)


@dataclass(frozen=True)
class Text:
    """A run of text. Neighbouring texts are joined by a space, unless one of them brings white space along.

    Attributes:
        text: what it says; None: an open slot.
        supervise: whether training learns to write it.
        role: who speaks (`system`, `user` or `assistant`), in a conversation.
        attached: whether it continues the text before it without a space.
    """

    text: str | None = None
    supervise: bool = True
    role: str | None = None
    attached: bool = False

    @property
    def is_open(self) -> bool:
        """Whether generation is to fill it."""
        return self.text is None


@dataclass(frozen=True)
class FileSlice:
    """A picture that is a part of a larger file, such as a member of a tar archive.

    Attributes:
        path: the file.
        offset: where it starts there, in bytes.
        length: its bytes.
    """

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """Its bytes; fewer if the file ends too soon."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    def __str__(self) -> str:
        return f"{self.path}@{self.offset}"


@dataclass(frozen=True)
class Image:
    """A picture.

    Attributes:
        source: path of a file, part of a file, or a PIL image; None: an open slot.
        supervise: whether training learns to draw it (and to announce it).
        role: who shows it, in a conversation.
        target: another picture for the image decoder to learn in its place; None: the picture itself.
    """

    source: str | Path | FileSlice | PIL.Image.Image | None = None
    supervise: bool = True
    role: str | None = None
    target: str | Path | FileSlice | PIL.Image.Image | None = None

    @property
    def is_open(self) -> bool:
        """Whether generation is to fill it."""
        return self.source is None


Segment = Text | Image


@dataclass
class Document:
    """Text and pictures in reading order.

    Attributes:
        segments: what stands in it.
        id: a name for messages and results.
        max_turns: how many texts and pictures to generate, if the document itself says so (the original's `num_iter`,
            2 where a record gives none).
        forced_texts: by turn, text that replaces the generated one (the original's `multiround_context`).
        stop_at_eos: whether `</s>` ends it; None: as the settings say. Records of the original do not end there.
        record: the original's record that it was read from, as it stood in the file.
        place: where it was read from, for messages.
    """

    segments: list[Segment] = field(default_factory=list)
    id: str | None = None
    max_turns: int | None = None
    forced_texts: list[str] = field(default_factory=list)
    stop_at_eos: bool | None = None
    record: dict[str, Any] | None = None
    place: str | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.place or (f"document '{self.id}'" if self.id else "the document")

    @property
    def images(self) -> list[Image]:
        """The pictures, open slots included."""
        return [s for s in self.segments if isinstance(s, Image)]

    @classmethod
    def from_dict(cls, data: Any, folder: Folder | None = None) -> Document:
        """A document from any of the three JSON forms.

        Args:
            data: decoded JSON.
            folder: where relative paths start and where they must stay; None: paths are taken as they are.

        Raises:
            DocumentError: something is missing, unknown or of the wrong type, or a path leads nowhere or outside.
        """
        data = _check(data, dict, "document", 'Write {"segments": [{"text": ...}, {"image": "path"}]}')
        _check_characters(data)
        for key, reader in (("segments", _from_segments), ("messages", _from_messages), ("sentences", _from_record)):
            if key in data:
                return reader(data, folder or Folder())
        raise DocumentError(
            f"none of the fields 'segments', 'messages' and 'sentences' is there, only {_list(data)}",
            fix='Write {"segments": [{"text": ...}, {"image": "path"}]}',
        )

    def to_dict(self) -> dict[str, Any]:
        """The `segments` form. Pictures must be paths.

        Raises:
            DocumentError: a picture exists only in memory.
        """
        data: dict[str, Any] = {"segments": [_segment_to_dict(s, i) for i, s in enumerate(self.segments)]}
        optional = {
            "id": self.id,
            "max_turns": self.max_turns,
            "forced_texts": self.forced_texts or None,
            "stop_at_eos": self.stop_at_eos,
        }
        return data | {k: v for k, v in optional.items() if v is not None}

    @classmethod
    def from_messages(cls, messages: Sequence[dict[str, Any]], folder: Folder | None = None) -> Document:
        """A document from chat messages with content parts (`text`, `image`, `image_url`)."""
        return cls.from_dict({"messages": messages}, folder)

    def to_messages(self) -> list[dict[str, Any]]:
        """Chat messages; segments without a role are the user's, and neighbours of one role make one message.

        A picture from a file is a part with a `path`, one in memory a part with an `image`.
        """
        messages: list[dict[str, Any]] = []
        for segment in self.segments:
            role = segment.role or "user"
            if not messages or messages[-1]["role"] != role:
                messages.append({"role": role, "content": []})
            if isinstance(segment, Text):
                part = {"type": "text", "text": segment.text}
            elif isinstance(segment.source, PIL.Image.Image):
                part = {"type": "image", "image": segment.source}
            else:
                part = {"type": "image", "path": None if segment.is_open else str(segment.source)}
            messages[-1]["content"].append(part)
        return messages

    def to_record(self) -> dict[str, Any]:
        """The original's record. Every text is a sentence; a picture stands after the sentence before it.

        Raises:
            DocumentError: the document has no picture, or an open slot anywhere but at its end.
        """
        sentences: list[str] = []
        images, places, first = [], [], []
        for index, segment in enumerate(self.segments):
            if segment.is_open and index < len(self.segments) - 1:
                raise DocumentError("a record of the original cannot have an open slot here", f"segments[{index}]")
            if isinstance(segment, Image):
                images.append("" if segment.is_open else _path_text(segment.source, index))
                places.append(max(len(sentences) - 1, 0))
                first.append(not sentences)
            elif segment.text is not None:
                sentences.append(segment.text)
        if not images:
            raise DocumentError("a record of the original needs at least one picture")
        record = {"sentences": sentences or [""], "images": images, "sentence_ixs": places, "image_first": first}
        record["generate_mode"] = "generate_images" if self.images[-1].is_open else "generate_texts"
        optional = {"num_iter": self.max_turns, "multiround_context": self.forced_texts or None, "id": self.id}
        return record | {k: v for k, v in optional.items() if v is not None}


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
        text = _check(text, str, where, "Give the path of a picture, or null for a slot to fill")
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


# The original's names of what to generate first.
_MODES = {
    "generate_texts": "text", "generate_images": "image", "generate_vqa": "text", "generate_grounding": "text",
    "generate_segm": "image",
}  # fmt: skip
_KINDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number", bool: "true or false"}


def _check(value: Any, kind: type, where: str, fix: str = "") -> Any:
    """`value`, which must be of that JSON type."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "null" if value is None else _KINDS.get(type(value), type(value).__name__)
        raise DocumentError(f"must be {_KINDS[kind]}, not {found}", where, fix)
    return value


def _check_characters(data: dict[str, Any]) -> None:
    """Refuse half characters (surrogates): JSON can spell them as escapes, but nothing can write them."""
    rest: list[tuple[str, Any]] = [("", data)]
    while rest:
        where, value = rest.pop()
        if isinstance(value, str):
            if half := re.search("[\ud800-\udfff]", value):
                raise DocumentError(f"half a character, \\u{ord(half[0]):04x}, at position {half.start()}", where,
                                    "Write the whole character, or remove it")  # fmt: skip
        elif isinstance(value, list):
            rest += [(f"{where}[{i}]", item) for i, item in enumerate(value)]
        elif isinstance(value, dict):
            rest += [(f"{where}, a field's name" if where else "a field's name", key) for key in value]
            rest += [(f"{where}.{key}" if where else str(key), item) for key, item in value.items()]


def _name(data: dict[str, Any]) -> str | None:
    """The `id` of a document; a number will do."""
    name = data.get("id")
    return str(name) if isinstance(name, int | float) else None if name is None else _check(name, str, "id")


def _check_list(value: Any, kind: type, where: str) -> list:
    return [_check(item, kind, f"{where}[{i}]") for i, item in enumerate(_check(value, list, where))]


def _check_fields(data: dict[str, Any], known: Sequence[str], where: str = "") -> None:
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            fix = f"Did you mean '{close[0]}'?" if close else f"Known fields: {', '.join(known)}"
            raise DocumentError(f"unknown field '{key}'", where, fix)


def _list(names: Any) -> str:
    return ", ".join(f"'{n}'" for n in names) or "nothing"


def _inline_picture(url: str, where: str) -> PIL.Image.Image:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise DocumentError("the data URL is not base64", where, "Write data:image/png;base64,...")
    try:
        return PIL.Image.open(io.BytesIO(base64.b64decode(payload, validate=True)))
    except (ValueError, OSError, SyntaxError, PIL.Image.DecompressionBombError):  # what base64 and PIL's readers raise
        raise DocumentError("the data URL holds no picture that can be read", where,
                            "Write data:image/png;base64,... with all of a PNG or JPEG") from None  # fmt: skip


def _from_segments(data: dict[str, Any], folder: Folder) -> Document:
    _check_fields(data, DOCUMENT_FIELDS)
    segments: list[Segment] = []
    for index, item in enumerate(_check(data["segments"], list, "segments")):
        where = f"segments[{index}]"
        _check_fields(_check(item, dict, where, 'Write {"text": ...} or {"image": ...}'), SEGMENT_FIELDS, where)
        if ("text" in item) == ("image" in item):
            raise DocumentError("a segment has either 'text' or 'image'", where)
        supervise = _check(item.get("supervise", True), bool, f"{where}.supervise")
        role = _check_role(item.get("role"), f"{where}.role")
        if "text" in item:
            text = item["text"] if item["text"] is None else _check(item["text"], str, f"{where}.text")
            segments.append(Text(text, supervise, role, _check(item.get("attached", False), bool, f"{where}.attached")))
            continue
        source, target = (
            None if item.get(key) is None else folder.picture(item[key], f"{where}.{key}")
            for key in ("image", "target")
        )
        segments.append(Image(source, supervise, role, target))
    if not segments:
        raise DocumentError("a document needs at least one segment", "segments")
    turns, stop = data.get("max_turns"), data.get("stop_at_eos")
    return Document(
        segments,
        _name(data),
        None if turns is None else _positive(turns, "max_turns"),
        _check_list(data.get("forced_texts", []), str, "forced_texts"),
        None if stop is None else _check(stop, bool, "stop_at_eos"),
    )


def _positive(value: Any, where: str) -> int:
    if _check(value, int, where) < 1:
        raise DocumentError(f"must be at least 1, not {value}", where)
    return value


def _check_role(role: Any, where: str) -> str | None:
    if role is not None and _check(role, str, where) not in ROLES:
        raise DocumentError(f"unknown role {role!r}", where, f"Roles are {', '.join(ROLES)}")
    return role


def _from_messages(data: dict[str, Any], folder: Folder) -> Document:
    _check_fields(data, ("messages", "id"))
    segments: list[Segment] = []
    for index, message in enumerate(_check(data["messages"], list, "messages")):
        where = f"messages[{index}]"
        _check_fields(_check(message, dict, where), ("role", "content"), where)
        role = _check_role(_check(message.get("role"), str, f"{where}.role"), f"{where}.role")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part_index, part in enumerate(_check(parts, list, f"{where}.content")):
            place = f"{where}.content[{part_index}]"
            segments.append(_from_part(_check(part, dict, place), role, folder, place))
    if not segments:
        raise DocumentError("a conversation needs at least one message", "messages")
    return Document(segments, _name(data))


def _from_part(part: dict[str, Any], role: str | None, folder: Folder, where: str) -> Segment:
    supervise = role == "assistant"
    kind = _check(part.get("type"), str, f"{where}.type", "Kinds are text, image and image_url")
    if kind == "text":
        return Text(_check(part.get("text"), str, f"{where}.text"), supervise, role)
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        return Image(folder.picture(url, f"{where}.image_url"), supervise, role)
    if kind == "image":
        for key in ("path", "image", "url"):
            if key in part:
                source = part[key]
                if not isinstance(source, PIL.Image.Image):
                    source = folder.picture(source, f"{where}.{key}")
                return Image(source, supervise, role)
        raise DocumentError("an image part needs 'path', 'image' or 'url'", where)
    raise DocumentError(f"unknown kind of content {kind!r}", f"{where}.type", "Kinds are text, image and image_url")


def _from_record(data: dict[str, Any], folder: Folder) -> Document:
    """The original's record (spec/model 6.6): pictures attached to sentences by number."""
    _check_fields(data, RECORD_FIELDS)
    missing = [key for key in RECORD_FIELDS[:4] if key not in data]
    if missing:
        raise DocumentError(f"the record lacks {_list(missing)}")
    sentences = _check_list(data["sentences"], str, "sentences")
    places, first = (
        _check_list(data["sentence_ixs"], int, "sentence_ixs"),
        _check_list(data["image_first"], bool, "image_first"),
    )
    paths = _check(data["images"], list, "images")
    if not paths:
        raise DocumentError("a record needs at least one picture", "images", "Use the 'segments' form for text alone")
    if not len(paths) == len(places) == len(first):
        raise DocumentError(f"images, sentence_ixs and image_first have {len(paths)}, {len(places)} and {len(first)} "
                            "entries", fix="Give one of each for every picture")  # fmt: skip
    for index, place in enumerate(places):
        if not 0 <= place < len(sentences):
            raise DocumentError(f"there is no sentence {place}", f"sentence_ixs[{index}]",
                                f"Sentences are numbered 0 to {len(sentences) - 1}")  # fmt: skip
    order = [(place, not before) for place, before in zip(places, first, strict=True)]
    for index in range(1, len(order)):
        if order[index] < order[index - 1]:
            raise DocumentError(f"picture {index} stands before picture {index - 1}", f"images[{index}]",
                                "List the pictures in the order in which they stand in the text")  # fmt: skip

    mode = data.get("generate_mode", "generate_texts")
    if _check(mode, str, "generate_mode") not in _MODES:
        raise DocumentError(f"unknown mode '{mode}'", "generate_mode", f"Modes are {', '.join(_MODES)}")
    draws_last = _MODES[mode] == "image"
    pictures = [
        Image() if draws_last and i == len(paths) - 1 else Image(folder.picture(p, f"images[{i}]"))
        for i, p in enumerate(paths)
    ]
    segments = _trimmed(interleave(sentences, list(zip(order, pictures, strict=True))))
    turns = data.get("num_iter")
    return Document(
        segments,
        _name(data),
        ORIGINAL_TURNS if turns is None else _positive(turns, "num_iter"),
        _check_list(data.get("multiround_context", []), str, "multiround_context"),
        stop_at_eos=False,
        record=data,
    )


def interleave(sentences: Sequence[str], placed: Sequence[tuple[tuple[int, bool], Image]]) -> list[Segment]:
    """Sentences joined by one space, with pictures at (sentence, whether after it), as MMC4 and records have them.

    White space next to a picture does not count, so runs of nothing else are left out.
    """
    segments: list[Segment] = []
    run: list[str] = []

    def close() -> None:
        if (text := " ".join(run)).strip():
            segments.append(Text(text))
        run.clear()

    for number, sentence in enumerate(sentences):
        for after in (False, True):
            for image in (image for spot, image in placed if spot == (number, after)):
                close()
                segments.append(image)
            if not after:
                run.append(sentence)
    close()
    return segments


def _trimmed(segments: list[Segment]) -> list[Segment]:
    """Texts without white space around them: next to pictures it does not count, at both ends a record has none."""
    return [Text(s.text.strip()) if isinstance(s, Text) else s for s in segments]


def _path_text(source: str | Path | FileSlice | PIL.Image.Image | None, index: int) -> str | None:
    if isinstance(source, (PIL.Image.Image, FileSlice)):
        problem = "is only part of a file" if isinstance(source, FileSlice) else "exists only in memory"
        raise DocumentError(f"the picture {problem}", f"segments[{index}]", "Save it and use its path")
    return None if source is None else str(source)


def _segment_to_dict(segment: Segment, index: int) -> dict[str, Any]:
    if isinstance(segment, Text):
        data: dict[str, Any] = {"text": segment.text}
        if segment.attached:
            data["attached"] = True
    else:
        data = {"image": _path_text(segment.source, index)}
        if segment.target is not None:
            data["target"] = _path_text(segment.target, index)
    if not segment.supervise:
        data["supervise"] = False
    if segment.role is not None:
        data["role"] = segment.role
    return data
