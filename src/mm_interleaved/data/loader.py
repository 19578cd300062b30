"""The loader of batches: worker processes, exact resumption, and a report of what was read."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from ..configuration import describe_differences
from ..io import InputError
from ..processor import Batch, MMInterleavedProcessor
from ..processor.packing import TokenStream
from ..processor.processor import ImageViews
from . import stores
from .config import DataConfig
from .mixture import MixtureBatch, with_sizes
from .partitions import Partition, deal, whole_partition
from .readers import LITERAL, Reader, make_reader
from .report import DataError, DataReport
from .stream import Place


def leave_process_group(worker: int) -> None:
    """In a worker process: do not receive signals of a terminal or scheduler to the whole process group.

    The main process still needs batches until it has saved a checkpoint; workers end when it ends.
    """
    os.setpgrp()


WORK: tuple[str, ...] = (
    "store",
    "tokenize",
    "decode",
)  # of a loading process: waiting for a store, reading text, making tensors of images
Parcel = tuple[Batch | None, dict[str, Any]]  # a batch, and what a worker has to say with it


def build_loader(
    config: DataConfig,
    processor: MMInterleavedProcessor,
    *,
    rank: int = 0,
    world_size: int = 1,
    folder: str | Path = ".",
) -> DocumentLoader:
    """A loader of batches.

    Args:
        config: sources and their mixture.
        processor: the model's processor.
        rank: number of this training process; each process reads its own part.
        world_size: number of training processes.
        folder: folder that a relative `config.root` starts from.

    Raises:
        DataError: a folder does not exist, or no file matches a pattern.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size}")
    return DocumentLoader(config, processor, rank, world_size, Path(folder, config.root))


class DocumentLoader:
    """Batches for one process of a run. Each iteration over it is one epoch.

    Args: see `build_loader`.
    """

    def __init__(
        self, config: DataConfig, processor: MMInterleavedProcessor, rank: int, world_size: int, folder: Path
    ) -> None:
        self._dataset = _PackedRows(config, processor, rank, world_size, folder)
        readers = self._dataset.readers()  # raises errors here instead of in a worker
        self.config = self._dataset.config = with_sizes(config, readers)
        self._report = DataReport()
        self._seconds = dict.fromkeys(WORK, 0.0)
        self._batches = 0  # of this epoch
        self._barren: dict[str, set[int]] = {}
        self._warned: set[str] = set()
        self._given_up: set[str] = set()
        self._pending: dict[str, Any] | None = None  # the state that the next iteration starts from
        self._loader: StatefulDataLoader | None = None

    @property
    def epoch(self) -> int:
        """The current epoch, or the next one between iterations."""
        return self._dataset.epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. If it is not that of a loaded state, the state is dropped."""
        if epoch != self._dataset.epoch:
            self._pending = self._loader = None
        self._dataset.epoch = epoch

    def report(self) -> DataReport:
        """The report of what was read and left out so far, in the batches that were yielded."""
        return DataReport(self._report.to_dict())

    def take_seconds(self) -> dict[str, float]:
        """The seconds that a worker spent on each kind of `WORK` since the last call, on average."""
        seconds, self._seconds = self._seconds, dict.fromkeys(WORK, 0.0)
        return {work: total / max(self.config.num_workers, 1) for work, total in seconds.items()}

    def contents(self) -> list[list[int | str | None]]:
        """For each source the number of its documents and a digest of what they say, as far as they are known."""
        return [_content(reader) for reader in self._dataset.readers()]

    def count_batches(self, report: Callable[[int], object] = lambda number: None) -> int:
        """The number of batches of the first epoch of this process, as if every image could be read.

        Documents are read and packed, their images are not. The position of the loader does not change.

        Args:
            report: called with the number so far after each batch.
        """
        return self._dataset.count_batches(max(self.config.num_workers, 1), report)

    def __iter__(self) -> Iterator[Batch]:
        self._loader = self._make_loader()
        self._barren, self._given_up = {}, set()
        if self._pending is not None:
            self._loader.load_state_dict(self._pending)
            self._pending = None
        elif self.epoch not in self._dataset.dealt:
            self._batches = 0
        for batch, message in self._loader:
            self._hear(message)
            if batch is not None:
                self._batches += 1
                yield batch
        self._loader = None
        self._dataset.dealt.pop(self._dataset.epoch, None)
        self._dataset.epoch += 1
        if not self._batches:
            counts = "\n".join(f"{s}: {'; '.join(self._report.lines(s))}" for s in self._report.sources)
            raise DataError(f"an epoch of the data has no batch:\n{counts}")

    def _make_loader(self) -> StatefulDataLoader:
        workers = self.config.num_workers
        pin = torch.cuda.is_available() if self.config.pin_memory is None else self.config.pin_memory
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata with a newer torch
            return StatefulDataLoader(
                self._dataset,
                batch_size=None,
                collate_fn=cast(Any, _as_it_is),  # gets a parcel, because `batch_size=None` makes no list of samples
                num_workers=workers,
                prefetch_factor=self.config.prefetch_factor if workers else None,
                worker_init_fn=leave_process_group if workers else None,
                multiprocessing_context=self.config.start_method if workers else None,
                pin_memory=pin,
                generator=torch.Generator().manual_seed(self.config.seed),  # does not use the global generator
            )

    def _hear(self, message: dict[str, Any]) -> None:
        """Merge the report of a worker; an error or a warning for sources without rows."""
        self._report.merge(message["report"])
        for work, seconds in message["seconds"].items():
            self._seconds[work] += seconds
        for source in self._report.sources:
            if source not in self._warned and self._report.rejected(source).get(LITERAL):
                self._warned.add(source)
                example = self._report.examples(source)[LITERAL]
                warnings.warn(
                    f"source '{source}' has Python literals instead of JSON (first: {example}); they are read, slowly",
                    stacklevel=3,
                )
        for source in message["barren"]:
            workers = self._barren.setdefault(source, set())
            workers.add(message["worker"])
            if len(workers) == max(self.config.num_workers, 1) and source not in self._given_up:
                self._given_up.add(source)
                problem = f"source '{source}' gave no batch in a whole pass: {'; '.join(self._report.lines(source))}"
                if self._dataset.world_size == 1:
                    raise DataError(problem)
                warnings.warn(f"rank {self._dataset.rank}: {problem}", stacklevel=3)  # other ranks may have rows

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was yielded, as small plain data."""
        dataset, loader = self._dataset, self._pending if self._loader is None else self._loader.state_dict()
        return {
            "processes": [dataset.rank, dataset.world_size, self.config.num_workers],
            "epoch": self.epoch,
            "batches": self._batches,
            "loader": loader,
            "dealt": [[epoch, parts] for epoch, parts in dataset.dealt.items()],
            "report": self._report.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue where `state_dict` was called in a process of this rank.

        Raises:
            DataError: the state belongs to other settings. (Other data are found when the iteration starts.)
        """
        rank, world_size, workers = state["processes"]
        if [rank, world_size] != [self._dataset.rank, self._dataset.world_size]:
            raise DataError(f"the state is that of process {rank} of {world_size}, and this is process "
                            f"{self._dataset.rank} of {self._dataset.world_size}", fix="Load those of all of them "
                            "together with 'load_states'")  # fmt: skip
        if workers != self.config.num_workers:
            raise DataError(
                f"the state was saved with {workers} workers, but 'num_workers' is {self.config.num_workers}",
                fix="Load the states of all processes together with 'load_states'",
            )
        self._dataset.epoch, self._dataset.dealt = state["epoch"], dict(state["dealt"])
        self._pending, self._loader = state["loader"], None
        self._batches, self._report = state["batches"], DataReport(state["report"])

    def load_states(self, states: Sequence[dict[str, Any]]) -> int:
        """Let the next iteration continue where `state_dict` was called on all processes of a run, by rank.

        With the same numbers of processes and workers the same batches follow as in a run without a break. With others
        each process gets a part of the batches that are left in the epochs that were begun, see `partitions`.

        Returns:
            the epoch in which this process continues.

        Raises:
            DataError: the states belong to other settings or data, or cannot be dealt to other processes.
        """
        dataset, workers = self._dataset, self.config.num_workers
        if not all("processes" in state for state in states):
            raise DataError("the saved state is of an earlier version of this package", fix="Resume with that version, "
                            "or start a new run from the weights with model.init_from.checkpoint")  # fmt: skip
        if all(s["processes"] == [rank, dataset.world_size, workers] for rank, s in enumerate(states)) and (
            len(states) == dataset.world_size
        ):
            self.load_state_dict(states[dataset.rank])
            return self.epoch
        for source in self.config.sources:
            if "unseeded_order" in source.compat:
                raise DataError(f"source '{source.name}' with 'compat: unseeded_order' has an order that other "
                                "processes cannot repeat", fix="Resume with as many processes and workers as before, "
                                "or start a new run from the weights with model.init_from.checkpoint")  # fmt: skip
        begun = [state["epoch"] for state in states if _position(state, 0) is not None]
        begun += [epoch for state in states for epoch, _ in state["dealt"]]
        first = min(state["epoch"] for state in states)
        dataset.dealt = {}
        for epoch in range(first, max(begun, default=first - 1) + 1):
            parts = [part for state in states for part in self._partitions_of(state, epoch)]
            dealt = deal(parts, dataset.world_size * max(workers, 1))
            if any(dealt):
                dataset.dealt[epoch] = dealt[dataset.rank :: dataset.world_size]
        self._pending = self._loader = None
        dataset.epoch = min(dataset.dealt, default=max(begun, default=first - 1) + 1)
        self._batches = sum(state["batches"] for state in states)
        self._report = DataReport()
        for state in states if dataset.rank == 0 else ():
            self._report.merge(state["report"])
        return self.epoch

    def _partitions_of(self, state: dict[str, Any], epoch: int) -> list[dict[str, Any]]:
        """The states of a process's partitions of an epoch; []: it has finished the epoch."""
        if state["epoch"] > epoch:
            return []
        rank, world_size, workers = state["processes"]
        dealt, found = dict(state["dealt"]), []
        for worker in range(max(workers, 1)):
            position = _position(state, worker) if state["epoch"] == epoch else None
            if position is not None:
                expected = self._dataset.identity(epoch, Place(rank, world_size, worker, max(workers, 1)))
                _check_identity(position["identity"], expected)
                found += position["partitions"]
            elif epoch in dealt:
                found += dealt[epoch][worker]
            else:
                found.append(whole_partition(Place(rank, world_size, worker, max(workers, 1))))
        return found


def _position(state: dict[str, Any], worker: int) -> dict[str, Any] | None:
    """The position of a worker in the state of a loader; None: it has not begun its epoch."""
    loader = state["loader"]
    if loader is None:
        return None
    if "_snapshot" in loader:  # the form of torchdata with workers
        loader = loader["_snapshot"]["_worker_snapshots"][f"worker_{worker}"]
    return loader["dataset_state"] or None


def _as_it_is(parcel: Parcel) -> Parcel:
    """The parcel unchanged; torch's conversion would turn a batch into a dictionary."""
    return parcel


def _content(reader: Reader) -> list[int | str | None]:
    """How many documents a pass has, and a digest of what they say or else of the files, as far as they are known."""
    return [getattr(reader, "size", None), getattr(reader, "digest", None) or getattr(reader.shards, "digest", None)]


def _check_identity(saved: Sequence[Any], own: Sequence[Any]) -> None:
    """Check that a saved state belongs to these data.

    Raises:
        DataError: it does not; names the differences.
    """
    if saved != own:
        changes = describe_differences(_named(saved), _named(own))
        raise DataError(
            f"the saved state belongs to other data settings or other data: {changes}. Keep these, or start a new run "
            "from the weights with model.init_from.checkpoint"
        )


def _named(identity: Sequence[Any]) -> dict[str, Any]:
    """The parts of an identity by name."""
    *numbers, sources = identity
    about = {name: dict(zip(("shards", "documents", "digest"), rest, strict=True)) for name, *rest in sources}
    return {**dict(zip(("seed", "epoch", "process", "processes"), numbers, strict=True)), "sources": about}


class _PackedRows(IterableDataset):
    """The data set of a worker process: sources, mixture, images, tensors."""

    def __init__(
        self, config: DataConfig, processor: MMInterleavedProcessor, rank: int, world_size: int, folder: Path
    ) -> None:
        self.config, self.processor, self.rank, self.world_size = config, processor, rank, world_size
        self.folder, self.epoch = folder, 0
        self._readers: list[Reader] = []
        self._current: _Parcels | None = None
        self._resume: dict[str, Any] | None = None
        self.dealt: dict[int, list[list[dict[str, Any]]]] = {}  # by epoch and worker; other epochs are not yet begun

    def identity(self, epoch: int, place: Place) -> list[Any]:
        """What the batches of a place follow from, besides the settings of the sources."""
        named = zip(self.config.sources, self.readers(), strict=True)
        sources = [[source.name, len(reader.shards.names), *_content(reader)] for source, reader in named]
        return [self.config.seed, epoch, place.consumer, place.consumers, sources]

    def readers(self) -> list[Reader]:
        """The readers of the sources. Workers that are forked have those of the main process, with what they read."""
        if not self._readers:
            self._readers = [make_reader(source, self.folder) for source in self.config.sources]
        return self._readers

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are spawned, which make readers of their own."""
        return self.__dict__ | {"_readers": []}

    def __iter__(self) -> _Parcels:
        worker = get_worker_info()
        place = Place(self.rank, self.world_size, *((worker.id, worker.num_workers) if worker else (0, 1)))
        identity, position = self.identity(self.epoch, place), self._resume
        self._resume = None
        if position is None:
            parts = self.dealt[self.epoch][place.worker] if self.epoch in self.dealt else [whole_partition(place)]
            position = {"partitions": parts, "turn": 0}
        else:
            _check_identity(position["identity"], identity)
        self._current = self._parcels(self.epoch, place.worker, position, identity)
        return self._current

    def _parcels(self, epoch: int, worker: int, position: dict[str, Any], identity: list[Any]) -> _Parcels:
        make = partial(Partition, self.config, self.processor, epoch, self.readers())
        return _Parcels(self.config, self.processor, worker, list(map(make, position["partitions"])), position["turn"],
                        identity)  # fmt: skip

    def count_batches(self, workers: int, report: Callable[[int], object]) -> int:
        """The batches of the first epoch, of all workers of this process together."""
        number = 0
        for worker in range(workers):
            place = Place(self.rank, self.world_size, worker, workers)
            partition = Partition(self.config, self.processor, 0, self.readers(), whole_partition(place))
            for _ in iter(partition.next_batch, None):
                number += 1
                report(number)
        return number

    def state_dict(self) -> dict[str, Any]:
        """For StatefulDataLoader, after each parcel."""
        return {} if self._current is None else self._current.position()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For StatefulDataLoader, before iteration."""
        self._resume = state or None


class _Parcels:
    """The parcels of one epoch for one process.

    Args:
        config: sources and their mixture.
        processor: the model's processor.
        worker: number of this process.
        partitions: its parts of the data, whose batches it takes in turn.
        turn: which of them is next, among those that are not done.
        identity: what its batches follow from.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: MMInterleavedProcessor,
        worker: int,
        partitions: Sequence[Partition],
        turn: int,
        identity: list[Any],
    ) -> None:
        self._config, self._processor, self._worker = config, processor, worker
        self._partitions, self._turn, self._identity = partitions, turn, identity
        self._report = DataReport()
        self._seconds = dict.fromkeys(WORK, 0.0)

    def __iter__(self) -> _Parcels:
        return self

    def __next__(self) -> Parcel:
        while active := [partition for partition in self._partitions if not partition.done]:
            with self._measured("tokenize"):
                mixed = active[self._turn % len(active)].next_batch()
            if mixed is None:
                self._turn %= len(active)
                if len(active) == 1:
                    return None, self._message()  # the report of the end of the epoch
                continue
            with self._measured("decode"):
                batch = self._collate(mixed)
            if batch is not None:
                self._turn = (self._turn + 1) % len(active)
                return batch, self._message()
        raise StopIteration

    @contextmanager
    def _measured(self, work: str) -> Iterator[None]:
        """Add the time of the block to that of this work, without what it waits for a store."""
        begin = time.perf_counter()
        yield
        waited = stores.waited.take()
        self._seconds["store"] += waited
        self._seconds[work] += time.perf_counter() - begin - waited

    def _message(self) -> dict[str, Any]:
        for partition in self._partitions:
            self._report.merge(partition.take_report())
        barren = [set(partition.barren) for partition in self._partitions]
        seconds, self._seconds = self._seconds, dict.fromkeys(WORK, 0.0)
        return {"worker": self._worker, "report": self._report.drain(), "barren": sorted(set.intersection(*barren)),
                "seconds": seconds}  # fmt: skip

    def position(self) -> dict[str, Any]:
        """The state after the last parcel."""
        states = [partition.state_dict() for partition in self._partitions]
        return {"identity": self._identity, "partitions": states, "turn": self._turn}

    # ---- images and tensors

    def _collate(self, mixed: MixtureBatch) -> Batch | None:
        """The batch; None: no row is left, because its images cannot be read."""
        rows, views, sources = [], [], []
        for index, row in zip(mixed.sources, mixed.rows, strict=True):
            found = self._load_images(row, index)
            if found is not None:
                rows.append(found[0])
                views += found[1]
                sources.append(self._config.sources[index])
        if not rows:
            return None
        limit = max(min(s.max_length or self._processor.max_length, self._processor.max_length) for s in sources)
        batch = self._processor.collate(
            rows,
            training=True,
            ignore_text_before_image=[s.ignore_text_before_image for s in sources],
            views=views,
            pad_to=limit if self._config.pad_to_max_length else 0,
            eight_bit=True,
            separate_samples=[s.attention == "sample" for s in sources],
        )
        batch.source = mixed.name
        for name in ("loss_text_weight", "loss_image_weight"):
            if (weight := getattr(sources[0], name)) is not None:
                batch[name] = weight
        return batch

    def _load_images(self, row: TokenStream, index: int) -> tuple[TokenStream, list[ImageViews]] | None:
        """A row with its images, without those that cannot be read; None: nothing to learn is left."""
        source = self._config.sources[index]
        views: list[ImageViews | None] = []
        for image in row.images:
            try:
                views.append(self._processor.views(image, training=True, draft=source.draft_jpeg))
            except InputError as error:
                self._report.reject(source.name, "image damaged", str(error))
                views.append(None)
        seen = [view for view in views if view is not None]
        if len(seen) < len(views):
            whole = source.packing != "stream"
            before = row.starts.sum()
            row, seen = self._without(row, views, whole_documents=source.is_pairs or whole)
            if whole:
                lost = int(before - row.starts.sum())
                self._report.reject(source.name, "document with a damaged image", number=lost)
            elif not row.images and not (source.keep_text_only and len(row)):
                self._report.reject(source.name, "row without an image")
            if not len(row) or not (row.images or whole or source.keep_text_only):
                return None
        self._report.count(source.name, "rows")
        self._report.count(source.name, "tokens", len(row))
        self._report.count(source.name, "images", len(row.images))
        return row, seen

    def _without(
        self, row: TokenStream, views: list[ImageViews | None], whole_documents: bool
    ) -> tuple[TokenStream, list[ImageViews]]:
        """A row without the images that have no view, or without their documents."""
        starts = np.flatnonzero(row.ids == self._processor.soi_token_id)
        kept = np.ones(len(row), bool)
        for start, view in zip(starts.tolist(), views, strict=True):
            if view is not None:
                continue
            if whole_documents:
                kept &= row.samples != row.samples[start]
            else:
                kept[start : start + self._processor.num_image_tokens + 1] = False
        stay = [i for i, start in enumerate(starts.tolist()) if kept[start]]
        seen = [view for i in stay if (view := views[i]) is not None]
        return row.select(kept, [row.images[i] for i in stay]), seen
