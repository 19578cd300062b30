"""Errors that the user can correct: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can correct.

    Attributes:
        problem: what is wrong.
        where: the file, record, key or argument.
        fix: what to do.
        kind: a short name for problems of one kind, for counting; "": none.
        status: exit status of a program that ends because of it.
    """

    status = 1

    def __init__(self, problem: str, where: str = "", fix: str = "", kind: str = "") -> None:
        self.problem, self.where, self.fix, self.kind = problem, where, fix, kind
        super().__init__(sentences(f"{where + ': ' if where else ''}{problem}", fix))

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


def sentences(*parts: str) -> str:
    """The parts that are not empty, joined as sentences; the last one gets no full stop."""
    *first, last = [part for part in parts if part] or [""]
    return " ".join([*(part if part.endswith((".", "?", "!")) else f"{part}." for part in first), last])


def close_name(name: str, known: Iterable[str]) -> str:
    """A question about the unknown name `name`, with the most similar known one; "": none is similar."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean '{close[0]}'?" if close else ""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """A sentence about the unknown name `name`: the most similar known one, or all of them."""
    known = list(known)
    return close_name(name, known) or f"Known: {', '.join(known) or 'none'}"
