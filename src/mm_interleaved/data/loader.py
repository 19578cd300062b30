"""The loader of batches: worker processes, exact resumption, and a report of what was read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from .config import DataConfig
from .grouping import GroupedBatches
from .mixture import Mixture, MixtureBatch, with_sizes
from .readers import LITERAL, Reader, make_reader
from .report import DataError, DataReport
from .stream import Place, SourceStream


def leave_process_group(worker: int) -> None:
    """In a worker process: do not receive signals of a terminal or scheduler to the whole process group.

    The main process still needs batches until it has saved a checkpoint; workers end when it ends.
    """
    os.setpgrp()


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

    def contents(self) -> list[list[int | str]]:
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
        else:
            self._batches = 0
        for batch, message in self._loader:
            self._hear(message)
            if batch is not None:
                self._batches += 1
                yield batch
        self._loader = None
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
        loader = self._pending if self._loader is None else self._loader.state_dict()
        return {"epoch": self.epoch, "batches": self._batches, "loader": loader, "report": self._report.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue where `state_dict` was called.

        Raises:
            DataError: the state belongs to other settings. (Other data are found when the iteration starts.)
        """
        if state["loader"] is not None:
            workers = len(state["loader"].get("_snapshot", {}).get("_worker_snapshots", {}))
            if workers != self.config.num_workers:
                raise DataError(
                    f"the state was saved with {workers} workers, but 'num_workers' is {self.config.num_workers}"
                )
        self._dataset.epoch = state["epoch"]
        self._pending, self._loader = state["loader"], None
        self._batches, self._report = state["batches"], DataReport(state["report"])


def _as_it_is(parcel: Parcel) -> Parcel:
    """The parcel unchanged; torch's conversion would turn a batch into a dictionary."""
    return parcel


def _content(reader: Reader) -> list[int | str]:
    """How many documents a pass has, and a digest of what they say, as far as the reader knows them."""
    known = (getattr(reader, name, None) for name in ("size", "digest"))
    return [value for value in known if value is not None]


def _named(identity: Sequence[Any]) -> dict[str, Any]:
    """The parts of `_Parcels._identity` by name."""
    *numbers, sources = identity
    about = {name: dict(zip(("shards", "documents", "digest"), rest, strict=False)) for name, *rest in sources}
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
        self._current = _Parcels(self.config, self.processor, self.epoch, place, self.readers(), self._resume)
        self._resume = None
        return self._current

    def count_batches(self, workers: int, report: Callable[[int], object]) -> int:
        """The batches of the first epoch, of all workers of this process together."""
        number = 0
        for worker in range(workers):
            place = Place(self.rank, self.world_size, worker, workers)
            parcels = _Parcels(self.config, self.processor, 0, place, self.readers(), None)
            for _ in parcels.plan():
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
    """The parcels of one epoch for one process."""

    def __init__(
        self,
        config: DataConfig,
        processor: MMInterleavedProcessor,
        epoch: int,
        place: Place,
        readers: Sequence[Reader],
        state: dict[str, Any] | None,
    ) -> None:
        self._config, self._processor, self._place = config, processor, place
        self._report = DataReport()
        self._done = False
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
                report=self._report,
            )
            for index, (source, reader) in enumerate(zip(config.sources, readers, strict=True))
        ]
        mixture = Mixture(config, streams, epoch, place)
        grouped = config.group_by_length
        self._mixture = GroupedBatches(config, mixture, epoch, place, self._report) if grouped else mixture
        sources = [[s.name, len(r.shards.names), *_content(r)] for s, r in zip(config.sources, readers, strict=True)]
        self._identity = [config.seed, epoch, place.consumer, place.consumers, sources]
        if state is not None:
            if state["identity"] != self._identity:
                changes = describe_differences(_named(state["identity"]), _named(self._identity))
                raise DataError(
                    f"the saved state belongs to other data settings or other data: {changes}. Keep these, or start "
                    "a new run from the weights with model.init_from.checkpoint"
                )
            self._mixture.load_state_dict(state["mixture"])
            self._done = state["done"]

    def __iter__(self) -> _Parcels:
        return self

    def __next__(self) -> Parcel:
        batch = None
        while not self._done and batch is None:
            mixed = self._mixture.next_batch()
            if mixed is None:
                self._done = True
                return None, self._message()  # the report of the end of the epoch
            batch = self._collate(mixed)
        if batch is None:
            raise StopIteration
        return batch, self._message()

    def plan(self) -> Iterator[MixtureBatch]:
        """The rows of every batch, without their images."""
        return iter(self._mixture.next_batch, None)

    def _message(self) -> dict[str, Any]:
        return {"worker": self._place.worker, "report": self._report.drain(), "barren": self._mixture.barren}

    def position(self) -> dict[str, Any]:
        """The state after the last parcel."""
        return {"identity": self._identity, "mixture": self._mixture.state_dict(), "done": self._done}

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
