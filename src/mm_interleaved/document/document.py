"""`Document`: text and images in reading order, and its conversion from and to JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import PIL.Image

from ..io import FileSlice, InputError, check_list, check_strings
from .checks import positive
from .folder import Folder
from .forms import read_form
from .segments import Image, Segment, Text
from .transform import Transform


@dataclass
class Document:
    """Text and images in reading order.

    Attributes:
        segments: the texts and images.
        id: a name for messages and results.
        max_turns: how many texts and images to generate; None: the settings decide. A record of the original has
            `num_iter`, or 2 without it.
        forced_texts: by turn, text that replaces the generated one (the original's `multiround_context`).
        stop_at_eos: whether generation stops at `</s>`; None: the settings decide. Records of the original set False.
        record: the original's record that the document was read from, unchanged.
        place: the file and line that the document was read from, for messages.

    Raises:
        InputError: a segment is neither a text nor an image, or `max_turns` is not an integer of at least 1.
    """

    segments: list[Segment] = field(default_factory=list)
    id: str | None = None
    max_turns: int | None = None
    forced_texts: list[str] = field(default_factory=list)
    stop_at_eos: bool | None = None
    record: dict[str, Any] | None = None
    place: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.segments, (str, Text, Image)):
            raise InputError(f"segments must be a list, not {type(self.segments).__name__}",
                             fix="Write Document([...])")  # fmt: skip
        self.segments = list(self.segments)
        for index, segment in enumerate(cast("list[object]", self.segments)):
            if not isinstance(segment, (Text, Image)):
                raise InputError(f"must be a Text or an Image, not {type(segment).__name__}", f"segments[{index}]")
        if self.max_turns is not None:
            positive(self.max_turns, "max_turns")
        check_strings(check_list(self.forced_texts, str, "forced_texts"), "forced_texts")

    @property
    def name(self) -> str:
        """The name of the document in messages."""
        return self.place or (f"document '{self.id}'" if self.id else "the document")

    @property
    def images(self) -> list[Image]:
        """The images, open slots included."""
        return [s for s in self.segments if isinstance(s, Image)]

    @property
    def generated(self) -> list[Segment]:
        """The segments that a model generated, in the order of their turns."""
        return [s for s in self.segments if s.generated is not None]

    @classmethod
    def from_dict(cls, data: Any, folder: Folder | None = None) -> Document:
        """A document from any of the three JSON forms.

        Args:
            data: decoded JSON.
            folder: the folder that paths are relative to and must stay in; None: paths are not checked.

        Raises:
            InputError: a field is missing, unknown or of the wrong type, or a path does not exist or is outside the
                folder.
        """
        return cls(**read_form(data, folder or Folder()))

    def to_dict(self) -> dict[str, Any]:
        """The `segments` form. Images must be paths.

        Raises:
            InputError: an image is in memory and not in a file, or is not used as it is in its file.
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
        """Chat messages. Segments without a role belong to the user; consecutive segments of one role form one message.

        An image from a file is a part with a `path`, one in memory a part with an `image`.
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
        """The original's record. Every text is a sentence; an image is attached after the preceding sentence.

        Raises:
            InputError: the document has no image, or has an open slot that is not at its end.
        """
        sentences: list[str] = []
        images: list[str | None] = []
        places: list[int] = []
        first: list[bool] = []
        for index, segment in enumerate(self.segments):
            if segment.is_open and index < len(self.segments) - 1:
                raise InputError("a record of the original cannot have an open slot here", f"segments[{index}]")
            if isinstance(segment, Image):
                images.append("" if segment.is_open else _path_text(segment.source, index))
                places.append(max(len(sentences) - 1, 0))
                first.append(not sentences)
            elif segment.text is not None:
                sentences.append(segment.text)
        if not images:
            raise InputError("a record of the original needs at least one image")
        record: dict[str, Any] = {
            "sentences": sentences or [""],
            "images": images,
            "sentence_ixs": places,
            "image_first": first,
        }
        record["generate_mode"] = "generate_images" if self.images[-1].is_open else "generate_texts"
        optional = {"num_iter": self.max_turns, "multiround_context": self.forced_texts or None, "id": self.id}
        return record | {k: v for k, v in optional.items() if v is not None}

    def _repr_html_(self) -> str:
        """The document in a notebook."""
        from .page import to_html  # it encodes images, which is needed in notebooks alone

        return to_html(self)


def _path_text(source: object, index: int) -> str | None:
    if isinstance(source, (PIL.Image.Image, FileSlice)):
        problem = "is only part of a file" if isinstance(source, FileSlice) else "exists only in memory"
        raise InputError(f"the image {problem}", f"segments[{index}]", "Save it and use its path")
    return None if source is None else str(source)


def _segment_to_dict(segment: Segment, index: int) -> dict[str, Any]:
    if isinstance(segment, Text):
        data: dict[str, Any] = {"text": segment.text}
        if segment.attached:
            data["attached"] = True
        if segment.boxes:
            data["boxes"] = [{"at": start, "box": list(b.sides), "image": b.image} for start, b in segment.boxes]
    else:
        if segment.transform is not None and replace(segment.transform, square=None) != Transform():
            raise InputError("the image is cut or flipped, which its path does not say", f"segments[{index}]",
                             "Save the changed image and use its path")  # fmt: skip
        data = {"image": _path_text(segment.source, index)}
        if segment.target is not None:
            data["target"] = _path_text(segment.target, index)
    if not segment.supervise:
        data["supervise"] = False
    if segment.role is not None:
        data["role"] = segment.role
    return data
