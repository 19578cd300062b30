"""An epoch's data in partitions, which any number of processes can go on with.

An epoch is divided into as many partitions as there are loading processes when it starts (`Place`). Each has its own
order, mixture and packing buffer, so its batches follow from its place and the seed alone. If a run goes on with
another number of processes, the partitions that are left are dealt to them. A process with several takes their batches
in turn. If there are fewer partitions than processes, some read one partition together: each reads all of it as text,
and takes every n-th batch.

Batch k of partition p of n is number k * n + p of the epoch. Dealing keeps this order if one number of processes
divides the other. So a step has the same batches if as many of them make a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..processor import MMInterleavedProcessor
from .config import DataConfig
from .grouping import GroupedBatches
from .mixture import Mixture, MixtureBatch
from .readers import Reader
from .report import DataReport
from .stream import Place, SourceStream


def whole_partition(place: Place) -> dict[str, Any]:
    """The state of a partition from which nothing was taken."""
    about = [place.rank, place.world_size, place.worker, place.num_workers]
    return {"place": about, "read": 0, "next": 0, "stride": 1, "counts": True, "done": False, "mixture": None}


class Partition:
    """Batches of one partition, as far as this process takes them.

    Args:
        config: sources and their mixture.
        processor: turns documents into tokens.
        epoch: epoch of the run.
        readers: readers of the sources.
        state: where it starts: its `place`; how many batches were `read`; the number of the `next` one that is taken
            here, and from there on of every one after `stride` others; whether what is read `counts` for the report
            (for one of several processes that read the same).

    Attributes:
        report: counts what is read and left out.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: MMInterleavedProcessor,
        epoch: int,
        readers: Sequence[Reader],
        state: dict[str, Any],
    ) -> None:
        self.report, place = DataReport(), Place(*state["place"])
        streams = [
            SourceStream(
                source,
                reader,
                processor,
                index=index,
                seed=config.seed,
                epoch=0 if "repeated_epochs" in config.compat else epoch,
                place=place,
                forever=config.sampling == "forever",
                report=self.report,
            )
            for index, (source, reader) in enumerate(zip(config.sources, readers, strict=True))
        ]
        mixture = Mixture(config, streams, epoch, place)
        grouped = config.group_by_length
        self._mixture = GroupedBatches(config, mixture, epoch, place, self.report) if grouped else mixture
        self._state = {name: value for name, value in state.items() if name != "mixture"}
        if state["mixture"] is not None:
            self._mixture.load_state_dict(state["mixture"])

    @property
    def done(self) -> bool:
        """Whether it has no batch left."""
        return self._state["done"]

    @property
    def barren(self) -> list[str]:
        """Sources that gave no row here in a whole pass."""
        return self._mixture.barren

    def next_batch(self) -> MixtureBatch | None:
        """The rows of the next batch that is taken here; None: there is none left."""
        state = self._state
        while not self.done:
            mixed = self._mixture.next_batch()
            state["read"] += 1
            if mixed is None:
                state["done"] = True
            elif state["read"] > state["next"]:
                state["next"] += state["stride"]
                return mixed
        return None

    def take_report(self) -> dict[str, Any]:
        """The report since the last call, as plain data; empty if another process counts the same."""
        found = self.report.drain()
        return found if self._state["counts"] else {}

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch, as small plain data."""
        return {**self._state, "mixture": self._mixture.state_dict()}


def deal(states: Sequence[dict[str, Any]], consumers: int) -> list[list[dict[str, Any]]]:
    """Deal the partitions of an epoch to loading processes.

    Args:
        states: states of all partitions.
        consumers: number of processes.

    Returns:
        for each process the states of its partitions; all lists are empty if no partition has a batch left.
    """
    left = sorted((s for s in states if not s["done"]), key=_number_of_next)
    if len(left) >= consumers or not left:
        return [left[consumer::consumers] for consumer in range(consumers)]
    dealt = []
    for consumer in range(consumers):
        state, part = left[consumer % len(left)], consumer // len(left)
        parts = len(range(consumer % len(left), consumers, len(left)))
        first, stride = state["next"] + part * state["stride"], state["stride"] * parts
        dealt.append([{**state, "next": first, "stride": stride, "counts": state["counts"] and part == 0}])
    return dealt


def _number_of_next(state: dict[str, Any]) -> int:
    """The number of its next batch among the batches of all partitions."""
    place = Place(*state["place"])
    return state["next"] * place.consumers + place.consumer
