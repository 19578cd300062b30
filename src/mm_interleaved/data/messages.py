"""Conversations in the forms of LLaVA, sharegpt and OpenAI (docs/data_formats.md, "Conversations").

Each record becomes the `messages` form of a document, with an image part for each `<image>` mark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np

from ..document import Box, Document, Segment, Text
from ..io import InputError, check_list, check_type
from ..io.images import ImageSource, upright_size
from .config import SourceConfig
from .readers import ImageFolder, Note, decode, kind_of, of_files
from .report import Rejected
from .shards import Record, RecordFiles

SPEAKERS = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant",
}  # fmt: skip
IMAGE_MARK, BOX_MARK, NAME_MARK = "<image>", "<bbox>", "<ref-object>"
_IMAGE = re.compile(rf"\s*{IMAGE_MARK}\s*")
_LAYOUT = 'Write {"messages": [{"role": "user", "content": ...}, ...]}, or "conversations" as LLaVA has them'
_OBJECT = re.compile(f"({BOX_MARK}|{NAME_MARK})")


class Messages:
    """Reader of conversations; see `data.readers.Reader`.

    Args:
        config: settings of the source.
        shards: files of JSON lines, or of one JSON list.
        images: the folder of the images.
    """

    crop = None

    def __init__(self, config: SourceConfig, shards: RecordFiles, images: ImageFolder) -> None:
        self.config, self.shards, self.images = config, shards, images
        self.size = shards.count()

    def document(self, record: Record, rng: np.random.Generator, note: Note) -> Document:
        """The conversation, of which the assistant's messages are learned."""
        where = self.shards.place(record)
        data = decode(record.payload, where)
        try:
            document = Document.from_dict({"messages": _messages(data)}, self.images.folder)
            document.segments = _with_objects(document, data.get("objects"))
        except InputError as error:
            raise Rejected(kind_of(error.problem), f"{where}: {error}") from None
        document.id, document.place = str(data["id"]) if "id" in data else None, where
        self.images.check_all(document, where)
        return document


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a record, with parts for text and images."""
    key = "messages" if "messages" in record else "conversations"
    if key not in record:
        raise InputError("a record has neither messages nor conversations", fix=_LAYOUT)
    names = _images(record)
    number, images = len(names), iter(names)
    turns = [_turn(turn, f"{key}[{i}]") for i, turn in enumerate(check_type(record.get(key), list, key, _LAYOUT))]
    if not turns or turns[-1]["role"] != "assistant":
        raise InputError("the last message is not the assistant's", key, "End with what is to be learned")
    marks = sum(_count_marks(turn["content"]) for turn in turns)
    if marks != number and (marks or not number):
        raise InputError(f"{number} images, but {marks} places for them ({IMAGE_MARK})", key,
                         "Write one place for each image, or none to show them before the first message")  # fmt: skip
    if number and not marks:
        first = next((turn for turn in turns if turn["role"] == "user" and isinstance(turn["content"], str)), None)
        if first is None:
            raise InputError(f"there is no place for {number} images", key, f"Write {IMAGE_MARK} where they belong")
        first["content"] = IMAGE_MARK * number + first["content"]
    return [turn | {"content": _parts(turn["content"], images)} for turn in turns]


def _images(record: dict[str, Any]) -> list[str]:
    """The images that belong to the marks, in order."""
    key = "images" if "images" in record else "image"
    value = record.get(key)
    # LLaVA's records without an image may have image: ""
    values = [] if value in (None, "") else value if isinstance(value, list) else [value]
    names = [v["path"] if isinstance(v, dict) and "path" in v else v for v in values]
    return check_list(names, str, key)


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """A message with the keys `role`, `content` and perhaps `loss`."""
    turn = check_type(turn, dict, where, _LAYOUT)
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    speaker = check_type(turn.get(role_key), str, f"{where}.{role_key}")
    if speaker not in SPEAKERS:
        raise InputError(f"unknown speaker '{speaker}'", f"{where}.{role_key}", f"Known are {', '.join(SPEAKERS)}")
    content = turn.get(text_key)
    if not isinstance(content, list):
        content = check_type(content, str, f"{where}.{text_key}")
    found: dict[str, Any] = {"role": SPEAKERS[speaker], "content": content}
    loss = turn.get("loss", turn.get("weight"))  # OpenAI's files for fine-tuning have a weight of 0 or 1
    if loss is not None:
        if loss not in (0, 1):
            raise InputError(f"the loss of a message is true or false, not {loss!r}", f"{where}.loss")
        if found["role"] == "assistant" or loss:
            found["loss"] = bool(loss)
    if found["role"] == "assistant" and isinstance(content, str) and not content.strip():
        raise InputError("an answer is blank", f"{where}.{text_key}", "Complete it, or leave the record out")
    return found


def _is_mark(part: Any) -> bool:
    """Whether a part is the place of one of the record's images: {"type": "image"}."""
    return isinstance(part, dict) and part.get("type") == "image" and not {"path", "image", "url"} & part.keys()


def _count_marks(content: str | list[Any]) -> int:
    return content.count(IMAGE_MARK) if isinstance(content, str) else sum(map(_is_mark, content))


def _parts(content: str | list[Any], images: Iterator[Any]) -> str | list[Any]:
    """The parts of a message, with an image in the place of each mark."""
    if isinstance(content, list):
        return [{"type": "image", "path": next(images)} if _is_mark(part) else part for part in content]
    if IMAGE_MARK not in content:
        return content
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(_IMAGE.split(content)):
        parts += [{"type": "image", "path": next(images)}] if number else []
        parts += [{"type": "text", "text": text}] if text.strip() else []
    return parts


def _with_objects(document: Document, value: Any) -> list[Segment]:
    """The segments with boxes and names of objects in the places of their marks.

    Args:
        document: the conversation.
        value: {"bbox": [[x1, y1, x2, y2]], "bbox_type": "real" or "norm1", "image_id": [0], "ref": ["a dog"]}, in the
            order of the marks; None: there are none.
    """
    where = "objects"
    objects = check_type({} if value is None else value, dict, where)
    names = check_list(objects.get("ref", []), str, f"{where}.ref")
    boxes = _boxes(objects, document)
    texts = [segment for segment in document.segments if isinstance(segment, Text)]
    for mark, found in ((BOX_MARK, boxes), (NAME_MARK, names)):
        places = sum((text.text or "").count(mark) for text in texts)
        if places != len(found):
            raise InputError(f"{len(found)} objects, but {places} places for them ({mark})", where,
                             "Write one place for each")  # fmt: skip
    fill: dict[str, Iterator[str | Box]] = {BOX_MARK: iter(boxes), NAME_MARK: iter(names)}
    return [_filled(segment, fill) if isinstance(segment, Text) else segment for segment in document.segments]


def _filled(text: Text, fill: dict[str, Iterator[str | Box]]) -> Text:
    parts = [next(fill[part]) if part in fill else part for part in _OBJECT.split(text.text or "")]
    made = Text.of(*parts)
    return replace(text, text=made.text, boxes=made.boxes)


def _boxes(objects: dict[str, Any], document: Document) -> list[Box]:
    """The boxes of a record, in pixels ("real") or in shares of the sides ("norm1")."""
    kind = objects.get("bbox_type", "real")
    if kind not in ("real", "norm1"):
        raise InputError(
            f"unknown kind of boxes {kind!r}", "objects.bbox_type", "Write real (pixels) or norm1 (0 to 1)"
        )
    values = check_type(objects.get("bbox", []), list, "objects.bbox")
    numbers = objects.get("image_id")
    numbers = [0 if numbers is None else numbers] * len(values) if not isinstance(numbers, list) else numbers
    if len(check_list(numbers, int, "objects.image_id")) != len(values):
        raise InputError(f"{len(values)} boxes, but {len(numbers)} numbers of images", "objects.image_id",
                         "Write one number for each box")  # fmt: skip
    boxes: list[Box] = []
    for index, (value, number) in enumerate(zip(values, numbers, strict=True)):
        place = f"objects.bbox[{index}]"
        sides = check_list(value, float, place)
        if len(sides) != 4:
            raise InputError(f"a box has 4 sides, not {len(sides)}", place, "Write [x1, y1, x2, y2]")
        if not 0 <= number < len(document.images):
            raise InputError(f"there is no image {number}, only {len(document.images)}", f"objects.image_id[{index}]",
                             "Images are numbered from 0")  # fmt: skip
        try:
            boxes.append(Box(*sides, image=number) if kind == "norm1" else
                         Box.from_pixels(sides, _size(document, number), number))  # fmt: skip
            boxes[-1].check_area()
        except InputError as error:
            raise error.at(place) from None
    return boxes


def _size(document: Document, number: int) -> tuple[int, int]:
    return upright_size(cast("ImageSource", document.images[number].source))


TYPE = of_files(Messages, RecordFiles, samples=True)
