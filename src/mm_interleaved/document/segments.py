"""What stands in a document, plain data, and what is said of one that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image


class DocumentError(ValueError):
    """A document that cannot be used: what is wrong, where, and what to do about it."""

    def __init__(self, problem: str, where: str = "", fix: str = "") -> None:
        self.problem, self.where, self.fix = problem, where, fix
        super().__init__(f"{where + ': ' if where else ''}{problem}{'. ' + fix if fix else ''}")

    def at(self, place: str) -> DocumentError:
        """The same error, seen from further out."""
        return DocumentError(self.problem, f"{place}, {self.where}" if self.where else place, self.fix)


@dataclass(frozen=True)
class Generated:
    """How a model generated a segment.

    Attributes:
        turn: number of the document's turn that it was made in, from 0.
        ids: for text, its tokens with the end token.
        text: for text, what the model generated, also where a forced text of the document stands in its place.
        candidates: for an image, all candidates; the first is the segment's source.
    """

    turn: int
    ids: tuple[int, ...] = ()
    text: str | None = None
    candidates: tuple[PIL.Image.Image, ...] = ()


@dataclass(frozen=True)
class Text:
    """A run of text. Neighbouring texts are joined by a space, unless one of them brings white space along.

    Attributes:
        text: what it says; None: an open slot.
        supervise: whether training learns to write it.
        role: who speaks (`system`, `user` or `assistant`), in a conversation.
        attached: whether it continues the text before it without a space.
        generated: how a model generated it; None: it was given. It does not count in comparisons.
    """

    text: str | None = None
    supervise: bool = True
    role: str | None = None
    attached: bool = False
    generated: Generated | None = field(default=None, compare=False, repr=False)

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
        generated: as of `Text`.
    """

    source: str | Path | FileSlice | PIL.Image.Image | None = None
    supervise: bool = True
    role: str | None = None
    target: str | Path | FileSlice | PIL.Image.Image | None = None
    generated: Generated | None = field(default=None, compare=False, repr=False)

    @property
    def is_open(self) -> bool:
        """Whether generation is to fill it."""
        return self.source is None


Segment = Text | Image
