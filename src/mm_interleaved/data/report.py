"""The report of what was read and what was left out, by source and reason. Nothing is dropped silently."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..io import InputError

# The counted quantities, in the order of `mmi data check`.
COUNTS = ("shards", "records", "documents", "images", "rows", "tokens")


class DataError(InputError):
    """Data that cannot be used, or a saved state that does not fit the data."""


class Rejected(Exception):
    """A record, image or shard that is left out.

    Args:
        reason: a short name of the kind of rejection, by which they are counted.
        example: the place and the problem.
    """

    def __init__(self, reason: str, example: str = "") -> None:
        self.reason, self.example = reason, example
        super().__init__(f"{reason}: {example}")


class DataReport:
    """Counts for each source, and for each reason of rejection a number and the first example.

    Reports of workers are combined by `merge`; their plain form (`to_dict`) is sent along with batches.
    """

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        self._counts: dict[str, dict[str, int]] = {}
        self._rejected: dict[str, dict[str, tuple[int, str]]] = {}
        if data:
            self.merge(data)

    def count(self, source: str, what: str, number: int = 1) -> None:
        """Add to one of `COUNTS`."""
        counts = self._counts.setdefault(source, {})
        counts[what] = counts.get(what, 0) + number

    def reject(self, source: str, reason: str, example: str = "", number: int = 1) -> None:
        """Count something that was left out."""
        rejected = self._rejected.setdefault(source, {})
        before, first = rejected.get(reason, (0, ""))
        rejected[reason] = (before + number, first or example)

    def merge(self, data: dict[str, Any] | DataReport) -> None:
        """Add another report, or its plain form."""
        data = data.to_dict() if isinstance(data, DataReport) else data
        for source, entry in data.items():
            for what, number in entry["counts"].items():
                self.count(source, what, number)
            for reason, (number, example) in entry["rejected"].items():
                self.reject(source, reason, example, number)

    def drain(self) -> dict[str, Any]:
        """The plain form; afterwards the report is empty."""
        data = self.to_dict()
        self._counts, self._rejected = {}, {}
        return data

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `{source: {"counts": {...}, "rejected": {reason: [number, example]}}}`."""
        return {
            source: {
                "counts": dict(self._counts.get(source, {})),
                "rejected": {r: list(v) for r, v in self._rejected.get(source, {}).items()},
            }
            for source in self.sources
        }

    @property
    def sources(self) -> list[str]:
        """The sources in the report."""
        return list(dict.fromkeys([*self._counts, *self._rejected]))

    def counts(self, source: str) -> dict[str, int]:
        """What was read, by name."""
        return dict(self._counts.get(source, {}))

    def rejected(self, source: str) -> dict[str, int]:
        """How many were left out, by reason."""
        return {reason: number for reason, (number, _) in self._rejected.get(source, {}).items()}

    def examples(self, source: str) -> dict[str, str]:
        """The first example of each reason."""
        return {reason: example for reason, (_, example) in self._rejected.get(source, {}).items()}

    def lines(self, source: str) -> Iterator[str]:
        """The lines that describe one source."""
        counts = self._counts.get(source, {})
        yield ", ".join(f"{counts.get(what, 0):,} {what}" for what in COUNTS)
        for reason, (number, example) in sorted(self._rejected.get(source, {}).items(), key=lambda i: -i[1][0]):
            yield f"{number:,} x {reason}" + (f" ({example})" if example else "")
