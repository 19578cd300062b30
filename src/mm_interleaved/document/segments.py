"""The segments of a document: plain data, checked in the constructor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import PIL.Image

from ..io import FileSlice, InputError, check_text
from .arrays import image_from_array, is_array
from .boxes import WIDTH, Box
from .transform import Transform

if TYPE_CHECKING:
    from torch import Tensor


ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Generated:
    """How a model generated a segment.

    Attributes:
        turn: number of the turn, from 0, that generated it.
        ids: for a text, its token ids with the end token.
        text: for a text, what the model generated, also if a forced text of the document replaced it.
        candidates: for an image, all candidates; the first is the segment's source.
    """

    turn: int
    ids: tuple[int, ...] = ()
    text: str | None = None
    candidates: tuple[PIL.Image.Image, ...] = ()


@dataclass(frozen=True)
class Text:
    """A text. Consecutive texts are joined by a space, unless there is white space between them already.

    Attributes:
        text: the string; None: an open slot.
        supervise: whether its tokens have a loss in training.
        role: the speaker in a conversation (`system`, `user` or `assistant`).
        attached: whether it continues the preceding text without a space.
        generated: how a model generated it; None: it was given. Comparisons ignore it.
        control_tokens: whether `<s>`, `</s>` and other special tokens in it are control tokens, as in chat templates
            and the original's records; in the text of users and data they are ordinary text.
        boxes: the boxes that the text states, each with the position of its first character.

    Raises:
        InputError: the text is not a string or has a lone surrogate, the role is unknown, or a box is not in the text.
    """

    text: str | None = None
    supervise: bool = True
    role: str | None = None
    attached: bool = False
    generated: Generated | None = field(default=None, compare=False, repr=False)
    control_tokens: bool = field(default=False, compare=False, repr=False)
    boxes: tuple[tuple[int, Box], ...] = ()

    def __post_init__(self) -> None:
        text = cast(object, self.text)
        if text is not None:
            if not isinstance(text, str):
                raise InputError(f"a text must be a string or None, not {type(text).__name__}")
            check_text(text)
        _check_role(self.role)
        for start, box in self.boxes:
            if start < 0 or (self.text or "")[start : start + WIDTH] != str(box):
                raise InputError(f"the text does not state the box {box} at character {start}",
                                 fix="Make such texts with Text.of")  # fmt: skip

    @classmethod
    def of(cls, *parts: str | Box, supervise: bool = True, role: str | None = None, attached: bool = False) -> Self:
        """The text of strings and boxes, which follow each other without spaces.

        Text.of("<ref>a dog</ref><box>", box, "</box>")
        """
        text = ""
        boxes: list[tuple[int, Box]] = []
        for part in parts:
            if isinstance(part, Box):
                boxes.append((len(text), part))
            text += str(part)
        return cls(text, supervise, role, attached, boxes=tuple(boxes))

    def move_boxes(self, change: Callable[[Box], Box]) -> Self:
        """The text with other boxes in the places of its own."""
        text, moved = self.text or "", [(start, change(box)) for start, box in self.boxes]
        for start, box in moved:
            text = text[:start] + str(box) + text[start + WIDTH :]
        return replace(self, text=text, boxes=tuple(moved)) if moved else self

    @property
    def is_open(self) -> bool:
        """Whether generation is to fill it."""
        return self.text is None


@dataclass(frozen=True)
class Image:
    """An image.

    Attributes:
        source: path of a file, part of a file, a PIL image, a NumPy array or a PyTorch tensor (see `arrays`; stored as
            a PIL image with 8 bits per channel); None: an open slot.
        supervise: whether it has an image loss in training, and the token that starts it a text loss.
        role: the speaker in a conversation who shows it.
        target: the image that the image decoder learns to generate instead of this one; None: this one.
        generated: as in `Text`.
        transform: which part of the image (and of its target) is used, and how it becomes square; None: all of it, and
            the processor's setting.
        boxes: the boxes that the document's texts state in this image, each with its number among all boxes of the
            document, from 1; `place_boxes` sets it.

    Raises:
        InputError: the source or target has another type, or is an array of an unsupported shape or range, or the role
            is unknown.
    """

    source: str | Path | FileSlice | PIL.Image.Image | np.ndarray | Tensor | None = None
    supervise: bool = True
    role: str | None = None
    target: str | Path | FileSlice | PIL.Image.Image | np.ndarray | Tensor | None = None
    generated: Generated | None = field(default=None, compare=False, repr=False)
    transform: Transform | None = None
    boxes: tuple[tuple[int, Box], ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", _checked_source(self.source))
        object.__setattr__(self, "target", _checked_source(self.target))
        _check_role(self.role)

    @property
    def is_open(self) -> bool:
        """Whether generation is to fill it."""
        return self.source is None


Segment = Text | Image


def place_boxes(segments: Sequence[Segment]) -> list[Segment]:
    """The segments; images get the boxes in them, and are stretched to squares, since boxes are shares of whole images.

    Raises:
        InputError: such an image is to be cropped to its central square, or there is no image of that number.
    """
    places = [place for place, segment in enumerate(segments) if isinstance(segment, Image)]
    boxes = [box for segment in segments if isinstance(segment, Text) for _, box in segment.boxes]
    changed = list(segments)
    for number in sorted({box.image for box in boxes}):
        if number >= len(places):
            raise InputError(f"a box is in image {number}, but there are {len(places)} images",
                             fix="Images are numbered from 0")  # fmt: skip
        image = cast(Image, changed[places[number]])
        transform = image.transform or Transform()
        if transform.square == "center":
            raise InputError("the image of a box would be cropped to its central square", f"segments[{places[number]}]",
                             "Use squash, which keeps all of it")  # fmt: skip
        inside = tuple((index, box) for index, box in enumerate(boxes, 1) if box.image == number)
        changed[places[number]] = replace(image, transform=replace(transform, square="squash"), boxes=inside)
    return changed


def _check_role(role: Any) -> None:
    if role is not None and role not in ROLES:
        raise InputError(f"unknown role {role!r}", fix=f"Roles are {', '.join(ROLES)}")


def _checked_source(source: Any) -> str | Path | FileSlice | PIL.Image.Image | None:
    if is_array(source):
        return image_from_array(source)
    if isinstance(source, (str, Path)) and "\0" in str(source):
        raise InputError("the path holds a null character", fix="Remove it")
    if source is None or isinstance(source, (str, Path, FileSlice, PIL.Image.Image)):
        return source
    if isinstance(source, os.PathLike):
        return Path(cast("os.PathLike[str]", source))
    raise InputError(
        f"an image must be a path, a PIL image, an array or a tensor, not {type(source).__name__}",
        fix="Bytes are opened with PIL.Image.open(io.BytesIO(data))",
    )
