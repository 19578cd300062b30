"""Batches of rows of similar lengths, which need less padding."""

from __future__ import annotations

import itertools
from typing import Any

from .config import DataConfig
from .mixture import Mixture, MixtureBatch
from .report import DataError, DataReport
from .stream import Place, Purpose, generator

WINDOW = 32  # batches whose rows are divided anew


class GroupedBatches:
    """The batches of a mixture, with their rows divided anew by length in every window of batches.

    Rows that may share a batch (of one source, or of all with `mix: row`) are sorted by length and divided into batches
    of the same sizes, whose order is random. A state has the position of the mixture at the start of the window, which
    is read again on resumption.

    Args:
        config: sources and their mixture.
        mixture: chooses the rows.
        epoch: epoch of the run; part of the seed.
        place: this process; part of the seed.
        report: counts what the mixture reads.
    """

    def __init__(self, config: DataConfig, mixture: Mixture, epoch: int, place: Place, report: DataReport) -> None:
        self._mixture, self._by_source, self._report = mixture, config.mix == "batch", report
        self._keys = (config.seed, epoch, place.rank, place.worker)
        self._start: dict[str, Any] = {}
        self._window: list[MixtureBatch] = []
        self._used = self._number = 0

    @property
    def barren(self) -> list[str]:
        """As of the mixture."""
        return self._mixture.barren

    def next_batch(self) -> MixtureBatch | None:
        """The rows of the next batch; None: the epoch is over."""
        if self._used == len(self._window):
            self._fill()
        if not self._window:
            return None
        self._used += 1
        return self._window[self._used - 1]

    def _fill(self) -> None:
        """Read the next window."""
        self._start, self._used = self._mixture.state_dict(), 0
        batches = list(itertools.islice(iter(self._mixture.next_batch, None), WINDOW))
        groups: dict[str, list[MixtureBatch]] = {}
        for batch in batches:
            groups.setdefault(batch.name if self._by_source else "", []).append(batch)
        divided = [new for group in groups.values() for new in self._divided(group)]
        order = generator(Purpose.GROUPS, *self._keys, self._number).permutation(len(divided))
        self._window, self._number = [divided[i] for i in order], self._number + 1

    def _divided(self, batches: list[MixtureBatch]) -> list[MixtureBatch]:
        """The rows of the batches in batches of the same sizes, by length."""
        rows = [pair for batch in batches for pair in zip(batch.sources, batch.rows, strict=True)]
        ordered = iter(sorted(rows, key=lambda pair: len(pair[1])))
        found = []
        for batch in batches:
            sources, own = zip(*itertools.islice(ordered, len(batch.rows)), strict=True)
            name = batch.name if self._by_source else self._mixture.name_of(sources)
            found.append(MixtureBatch(name, list(sources), list(own)))
        return found

    def state_dict(self) -> dict[str, Any]:
        """The position: that of the mixture at the start of the window, and the number of its used batches."""
        if self._used == len(self._window):
            return {"start": self._mixture.state_dict(), "used": 0, "number": self._number}
        return {"start": self._start, "used": self._used, "number": self._number - 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called.

        Raises:
            DataError: the state has batches that are not grouped, or the data have changed since.
        """
        if "start" not in state:
            raise DataError("the saved state is from before 'group_by_length' was set; leave it out to resume")
        self._mixture.load_state_dict(state["start"])
        self._number = state["number"]
        if state["used"]:
            self._fill()
            self._report.drain()  # the records of this window were counted before
            self._used = state["used"]
