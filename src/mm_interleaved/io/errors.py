"""Errors that the user can correct: what is wrong, where, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can correct.

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
        """Pickle all parts of the error, since processes send errors to each other."""
        return type(self), (self.problem, self.where, self.fix, self.kind)


class InputError(UserError, ValueError):
    """An input that cannot be used: a document, a file, a name, an image or a setting."""

    def at(self, place: str) -> InputError:
        """The same error with `place` in front of its place."""
        return type(self)(self.problem, f"{place}, {self.where}" if self.where else place, self.fix, self.kind)


class OutputError(UserError, RuntimeError):
    """A file that cannot be written. Not an `InputError`, since readers skip bad samples but must not skip these."""
