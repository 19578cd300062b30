"""Errors that the user can mend: what is wrong, where, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can mend.

    Attributes:
        problem: what is wrong.
        where: the file, record, key or argument.
        fix: what to do.
        kind: a short name for problems of one kind, for counting; "": none.
    """

    def __init__(self, problem: str, where: str = "", fix: str = "", kind: str = "") -> None:
        self.problem, self.where, self.fix, self.kind = problem, where, fix, kind
        super().__init__(f"{where + ': ' if where else ''}{problem}{'. ' + fix if fix else ''}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str, str]]:
        """Processes hand errors to each other; the parts survive that."""
        return type(self), (self.problem, self.where, self.fix, self.kind)


class InputError(UserError, ValueError):
    """Something given that cannot be used: a document, a file, a name, an image, a setting."""

    def at(self, place: str) -> InputError:
        """The same error with `place` in front of where it is."""
        return type(self)(self.problem, f"{place}, {self.where}" if self.where else place, self.fix, self.kind)


class OutputError(UserError, RuntimeError):
    """Something that cannot be written. It is no `InputError`: a bad sample may be left out, a full disk may not."""
