"""What is said of a document that cannot be used."""

from __future__ import annotations

import struct
import zlib

# What PIL's readers raise for damaged data, and for images that were closed.
UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, AssertionError, EOFError, LookupError, TypeError, OverflowError,
                    struct.error, zlib.error)  # fmt: skip


class DocumentError(ValueError):
    """A document that cannot be used: what is wrong, where, and what to do about it."""

    def __init__(self, problem: str, where: str = "", fix: str = "") -> None:
        self.problem, self.where, self.fix = problem, where, fix
        super().__init__(f"{where + ': ' if where else ''}{problem}{'. ' + fix if fix else ''}")

    def __reduce__(self) -> tuple[type[DocumentError], tuple[str, str, str]]:
        """Processes hand errors to each other; the parts survive that."""
        return type(self), (self.problem, self.where, self.fix)

    def at(self, place: str) -> DocumentError:
        """The same error, seen from further out."""
        return DocumentError(self.problem, f"{place}, {self.where}" if self.where else place, self.fix)
