"""What was read and what was left out, by source and reason. Nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..io import InputError

# What is counted, in the order of `mmi data check`.
COUNTS = ("shards", "records", "documents", "images", "rows", "tokens")


class DataError(InputError):
    """Data that cannot be used at all, or a saved state that does not fit it."""


class Rejected(Exception):
    """A record, image or shard that is left out.

    Args:
        reason: a short name for its kind; rejections are counted by it.
        example: where it is and what exactly is wrong.
    """

    def __init__(self, reason: str, example: str = "") -> None:
        self.reason, self.example = reason, example
        super().__init__(f"{reason}: {example}")


class DataReport:
    """Counts for each source, and for each reason of rejection a number and the first example.

    Reports of workers are added up with `merge`; their plain form (`to_dict`) travels with batches.
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
        """Something was left out."""
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
        """The sources that something is known of."""
        return list(dict.fromkeys([*self._counts, *self._rejected]))

    def counts(self, source: str) -> dict[str, int]:
        """By name, what was read."""
        return dict(self._counts.get(source, {}))

    def rejected(self, source: str) -> dict[str, int]:
        """By reason, how many were left out."""
        return {reason: number for reason, (number, _) in self._rejected.get(source, {}).items()}

    def examples(self, source: str) -> dict[str, str]:
        """By reason, the first example."""
        return {reason: example for reason, (_, example) in self._rejected.get(source, {}).items()}

    def lines(self, source: str) -> Iterator[str]:
        """One source in words."""
        counts = self._counts.get(source, {})
        yield ", ".join(f"{counts.get(what, 0):,} {what}" for what in COUNTS)
        for reason, (number, example) in sorted(self._rejected.get(source, {}).items(), key=lambda i: -i[1][0]):
            yield f"{number:,} x {reason}" + (f" ({example})" if example else "")
