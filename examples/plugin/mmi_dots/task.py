"""A task, "how many dots are there?", and its metric: by how many the answers are wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mm_interleaved.document import Text
from mm_interleaved.evaluation.scoring import ScoringInputs
from mm_interleaved.metrics import MetricResult, gives
from mm_interleaved.tasks import Item, Source, TaskType, each, given
from mm_interleaved.tasks.files import get, line_entries

from .source import QUESTION


def read(source: Source) -> Iterator[Item]:
    """Yield the items of `answers.jsonl`, lines of {image, count}."""

    def make(where: str, record: dict[str, Any], index: int) -> Iterator[Item]:
        image, problem = source.images.find(get(record, "image", str, where))
        count = get(record, "count", int, where)
        yield Item(str(index), {"image": given(image)}, count, [Text(str(count))], problem=problem, place=where)

    return each(line_entries(source.file("answers.jsonl")), make)


TASK = TaskType("dots", "how many dots an image shows", read, makes="text", prompt=f"{{image}}{QUESTION}",
                metrics=("count_error",), images="dots", annotations="dots",
                obtain="Write them with `mmi dots`")  # fmt: skip


@gives("count_error")
def count_error(given: ScoringInputs) -> MetricResult:
    """Return the mean distance of the first number in an answer from the right one; without a number it is that."""
    predictions, references = given.by_id("prediction"), given.references()
    errors = {}
    for key, right in references.items():
        said = re.search(r"\d+", predictions[key])
        errors[key] = float(abs((int(said[0]) if said else 0) - right))
    return MetricResult.of_means({"count_error": errors})
