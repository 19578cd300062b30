"""Tasks as sources of training data: the items of a data set's phase become documents, in which answers are learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..document import Document, Text
from ..io import InputError
from ..tasks import TASKS, Item, TaskConfig, make_task
from .config import SourceConfig
from .readers import ImageFolder, Note, kind_of
from .report import DataError, Rejected
from .shards import NumberedRecords, Record, digest
from .sources import SourceType

SHARD_SIZE = 256  # items of a shard: whole shards are shuffled, so neighbours in a file of images come far apart


class TaskReader:
    """Reader of a task's items; see `data.readers.Reader`.

    All items are read at once and kept without their references. A document has its own random choices of a prompt, an
    answer, a frame and so on in every epoch.

    Args:
        config: settings of the source.
        options: settings of the task.
        folder: the folder that relative paths start from; then comes the source's `root`.

    Raises:
        DataError: a setting or a file of the task cannot be used, or the task has no phase for training.
    """

    def __init__(self, config: SourceConfig, options: TaskConfig, folder: Path) -> None:
        kind = TASKS[options.task]
        phase = options.phase or kind.train
        if not phase:
            raise DataError(f"source '{config.name}': task '{kind.name}' has no phase for training; its phases are "
                            f"{', '.join(kind.phases)}. Name one of them as 'phase' to train on it")  # fmt: skip
        try:
            self.task = make_task(replace(_rooted(options, folder / config.root), phase=phase))
            self.items = [_without_reference(item) for item in self.task.items(training=True)]
        except InputError as error:
            raise DataError(f"source '{config.name}': {error}") from None
        self.crop, self.size = self.task.crop, len(self.items)
        self.digest = digest(repr([item.id, *_texts(item)]).encode() for item in self.items)
        self.shards = NumberedRecords(f"{self.task.name} {phase}", self.size, SHARD_SIZE)
        self._images = ImageFolder(folder, config.probe_images)

    def document(self, record: Record, rng: np.random.Generator, note: Note) -> Document:
        """The document of an item."""
        item: Item = self.items[record.payload]
        where = item.place or self.shards.place(record)
        if item.problem:
            raise Rejected(kind_of(item.problem), f"{where}: {item.problem}")
        try:
            document = self.task.document(item, rng)
        except InputError as error:
            raise Rejected(kind_of(error.problem), f"{where}: {error}") from None
        document.place = where
        self._images.check_all(document, where)
        return document


def _texts(item: Item) -> list[str]:
    """The texts of an item: its images may lie in another folder when a run is resumed."""
    texts = [value for value in item.fields.values() if isinstance(value, str)]
    return texts + [str(segment.text) for segment in item.answer if isinstance(segment, Text)]


def _rooted(config: TaskConfig, root: Path) -> TaskConfig:
    """The settings with paths that start from `root`."""
    names = ("root", "images", "annotations", "shot_images", "shot_annotations", "neighbours")
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    return replace(config, **{name: str(root / value) for name, value in given.items()})


def _without_reference(item: Item) -> Item:
    """The item without what only metrics use, since all items of a phase stay in memory."""
    return replace(item, reference=None, options=(), meta={})


TYPE = SourceType(TaskReader, TaskConfig, has_files=False, samples=True)
