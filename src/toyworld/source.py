"""The toy world as a source of training data: documents are drawn when they are needed."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mm_interleaved.data import DataError, SourceConfig
from mm_interleaved.data.shards import NumberedRecords, Record
from mm_interleaved.data.sources import SourceType
from mm_interleaved.document import Document
from mm_interleaved.validation import Positive, settings

from .documents import DocumentMix, toy_document
from .sampling import Split


@settings
class FirstOptions:
    """What the first documents of a pass have instead.

    Attributes:
        documents: how many they are.
        size, mix, objects: as in `ToyWorldOptions`; None: as all others.
    """

    documents: Positive
    size: Positive | None = None
    mix: dict[str, float] | None = None
    objects: tuple[int, int] | None = None


@settings
class ToyWorldOptions:
    """Options of a source of type `toyworld`.

    Attributes:
        split: train, val or test, which share no scene.
        documents: of a pass; every pass draws new ones.
        size: side of the images in pixels.
        mix: how often each form of document comes, by the names of `DocumentMix`; `rest` is the weight of those that
            are not named.
        objects: the fewest and the most objects of a scene.
        first: other options for the first documents of a pass, so that easy ones come first.
    """

    split: Literal["train", "val", "test"] = "train"
    documents: Positive = 100_000
    size: Positive = 256
    mix: dict[str, float] = field(default_factory=dict)
    objects: tuple[int, int] = (1, 5)
    first: FirstOptions | None = None


class ToyWorld:
    """Reader of documents that are drawn as they are needed; see `mm_interleaved.data.readers.Reader`.

    Raises:
        DataError: an option that the toy world does not know.
    """

    def __init__(self, config: SourceConfig, options: ToyWorldOptions, folder: Path) -> None:
        self.shards = NumberedRecords(f"toyworld {options.split}", options.documents)
        self._split: Split = options.split
        self._early = 0 if options.first is None else options.first.documents
        try:
            self._options = _arguments(options)
            self._first = self._options | ({} if options.first is None else _arguments(options.first))
            for chosen in (self._options, self._first):
                toy_document(0, self._split, 0, **chosen)
        except (TypeError, ValueError) as error:
            raise DataError(f"source '{config.name}': the toy world refuses its options: {error}") from None

    def document(self, record: Record, rng: np.random.Generator, note: object) -> Document:
        """Draw a document, another one for every draw of `rng`."""
        options = self._first if record.payload < self._early else self._options
        document = toy_document(int(rng.integers(2**31)), self._split, record.payload, **options)
        document.place = self.shards.place(record)
        return document


def _arguments(options: ToyWorldOptions | FirstOptions) -> dict[str, Any]:
    """Return the options that are given as arguments of `toy_document`."""
    mix = None if options.mix is None else DocumentMix.of(options.mix)
    given = {"size": options.size, "mix": mix, "objects": options.objects}
    return {name: value for name, value in given.items() if value is not None}


SOURCE = SourceType(ToyWorld, ToyWorldOptions, has_files=False)
