"""A source of training data without files: images of dots, and how many there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw

from mm_interleaved.data.config import SourceConfig
from mm_interleaved.data.shards import NumberedRecords, Record
from mm_interleaved.data.sources import SourceType
from mm_interleaved.document import Document, Image, Text
from mm_interleaved.validation import Positive, settings

QUESTION = "How many dots are there?"


def draw_dots(count: int, rng: np.random.Generator) -> PIL.Image.Image:
    """Return an image of `count` dots, each in a cell of its own of a 4 x 4 grid."""
    image = PIL.Image.new("RGB", (128, 128), "white")
    pen = PIL.ImageDraw.Draw(image)
    for cell in rng.permutation(16)[:count].tolist():
        left, top = cell % 4 * 32 + 8, cell // 4 * 32 + 8
        pen.ellipse((left, top, left + 16, top + 16), fill="black")
    return image


@settings
class DotsOptions:
    """What stands under `options` of a source of this type.

    Attributes:
        documents: of a pass.
        most: dots of an image.
    """

    documents: Positive = 1000
    most: Positive = 9


class Dots:
    """Reader of a source of type `dots`."""

    def __init__(self, config: SourceConfig, options: DotsOptions, folder: Path) -> None:
        self.options = options
        self.shards = NumberedRecords("dots", options.documents)

    def document(self, record: Record, rng: np.random.Generator, note: object) -> Document:
        """Return an image, the question, and the answer to learn; all chance comes from `rng`."""
        count = int(rng.integers(1, self.options.most + 1))
        image = Image(draw_dots(count, rng), supervise=False)
        return Document([image, Text(QUESTION, supervise=False), Text(str(count))], place=self.shards.place(record))


SOURCE = SourceType(Dots, DotsOptions, has_files=False)
