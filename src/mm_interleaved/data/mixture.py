"""The choice of the source for each batch or row (docs/data_formats.md, "Mixture")."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..processor.packing import TokenStream
from .config import DataConfig
from .readers import Reader
from .report import DataError
from .stream import Place, Purpose, SourceStream, generator


class MixtureBatch(NamedTuple):
    """Rows of one batch.

    Attributes:
        name: name of the source; with `mix: row` the names of all of them, joined by "+".
        sources: for each row the number of its source.
        rows: the rows.
    """

    name: str
    sources: list[int]
    rows: list[TokenStream]


def with_sizes(config: DataConfig, readers: Sequence[Reader]) -> DataConfig:
    """The settings with numbers for `probabilities: sqrt_size`.

    Raises:
        DataError: a source does not know its number of documents.
    """
    if config.probabilities != "sqrt_size":
        return config
    sizes: list[float] = []
    for source, reader in zip(config.sources, readers, strict=True):
        if source.replay:
            continue
        size = getattr(reader, "size", None)
        if size is None:
            problem = f"'probabilities: sqrt_size' needs the number of documents of source '{source.name}'"
            raise DataError(f"{problem}, which sources of type '{source.type}' do not know; write numbers")
        sizes.append(math.sqrt(size))
    return replace(config, probabilities=sizes)


def source_weights(config: DataConfig) -> list[float]:
    """The relative probability of each source: `probabilities`, with `replay_share` for the sources with `replay`."""
    if isinstance(config.probabilities, str):
        raise ValueError(f"'{config.probabilities}' is replaced by numbers in with_sizes")
    own = iter(config.probabilities or [1.0] * len(config.own_sources))
    weights = [0.0 if source.replay else next(own) for source in config.sources]
    if config.replay_share:
        total = sum(weights) * config.replay_share / (1 - config.replay_share)
        each = total / (len(config.sources) - len(config.own_sources))
        weights = [each if source.replay else w for source, w in zip(config.sources, weights, strict=True)]
    return weights


class Mixture:
    """Chooses sources by probability until the epoch is over.

    Args:
        config: sources and their mixture.
        streams: one for each source.
        epoch: epoch of the run; part of the seed.
        place: this process; part of the seed.
    """

    def __init__(self, config: DataConfig, streams: Sequence[SourceStream], epoch: int, place: Place) -> None:
        self.config, self.streams = config, streams
        self._place, self._epoch = place, epoch
        self._weights = source_weights(config)
        self._replayed = {i for i, source in enumerate(config.sources) if source.replay}
        self._active = [i for i, weight in enumerate(self._weights) if weight > 0]
        self._names = [s.name for s in config.sources]
        self._finished: set[int] = set()  # exhausted at least once
        self._barren: set[int] = set()  # without a row in a whole pass
        self._gave = [False] * len(streams)  # whether the current pass has given a row
        self._draws = 0

    @property
    def barren(self) -> list[str]:
        """Sources that gave no row here in a whole pass, and are not chosen any more."""
        return [self.config.sources[i].name for i in sorted(self._barren)]

    def next_batch(self) -> MixtureBatch | None:
        """The rows of the next batch; None: the epoch is over. An incomplete one is used if a source of it says so."""
        if self.config.mix == "batch":
            return self._rows(None)
        sources: list[int] = []
        rows: list[TokenStream] = []
        while len(rows) < self.config.batch_size:
            found = self._rows(1)
            if found is None:
                if not any(self.config.sources[i].keep_remainder for i in sources):
                    return None
                break
            sources, rows = [*sources, found.sources[0]], [*rows, *found.rows]
        return MixtureBatch(self.name_of(sources), sources, rows)

    def name_of(self, sources: Iterable[int]) -> str:
        """The name of a batch with rows of these sources."""
        return "+".join(self._names[i] for i in sorted(set(sources)))

    def _rows(self, number: int | None) -> MixtureBatch | None:
        """That many rows of a randomly chosen source; None: the batch size of the source."""
        while set(self._active) - self._replayed and not self._is_over():
            source = self._draw()
            stream, wanted = self.streams[source], number or self.config.sources[source].batch_size
            rows: list[TokenStream] = []
            while len(rows) < wanted and (row := stream.next_row()) is not None:
                rows.append(row)
            if len(rows) == wanted or (rows and self.config.sources[source].keep_remainder):
                self._gave[source] = True
                return MixtureBatch(self._name(source), [source] * len(rows), rows)
            if rows:
                stream.report.reject(stream.config.name, "row of an incomplete batch", number=len(rows))
            self._exhausted(source)
        return None

    def _is_over(self) -> bool:
        finished = self._finished - self._replayed
        if self.config.sampling == "longest":
            return finished >= set(self._active) - self._replayed
        return self.config.sampling == "shortest" and bool(finished)

    def _draw(self) -> int:
        """The first active source whose cumulative probability reaches a uniform number."""
        same = self.config.fix_sampling_ratio
        where = (0, 0) if same else (self._place.rank, self._place.worker)
        rng = generator(Purpose.MIXTURE, self.config.seed, self._epoch, *where, self._draws)
        self._draws += 1
        shares = np.cumsum([self._weights[i] for i in self._active])
        index = int(np.searchsorted(shares, rng.random() * shares[-1]))
        return self._active[(index + self._place.rank) % len(self._active) if same else index]

    def _name(self, source: int) -> str:
        if "shifted_names" in self.config.compat:
            return self._names[self._active.index(source)]
        return self._names[source]

    def _exhausted(self, source: int) -> None:
        gave, self._gave[source] = self._gave[source], False
        if gave:
            self._finished.add(source)
        else:
            self._barren.add(source)
        replayed = source in self._replayed
        if not gave or (self.config.sampling == "sum" and not replayed):
            self._active.remove(source)
        elif self.config.sampling != "shortest" or replayed:
            self.streams[source].restart()

    def state_dict(self) -> dict[str, Any]:
        """The positions of the mixture and its streams."""
        return {
            "draws": self._draws,
            "active": list(self._active),
            "finished": sorted(self._finished),
            "barren": sorted(self._barren),
            "gave": list(self._gave),
            "streams": [stream.state_dict() for stream in self.streams],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called.

        Raises:
            DataError: the state has grouped batches, or the data have changed since.
        """
        if "start" in state:
            raise DataError("the saved state has batches that are grouped; set 'group_by_length' to resume")
        self._draws, self._active = state["draws"], list(state["active"])
        self._finished, self._barren = set(state["finished"]), set(state["barren"])
        self._gave = list(state["gave"])
        for stream, stream_state in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(stream_state)
