"""The folder of a task's predictions: JSON lines that grow while a run goes on, and the images that they name.

    run.json             what the predictions were made with (another run is refused), and how many samples were asked
                         for, first and later
    predictions.jsonl    one object a sample, in the order of the task: index, id and text, images or scores
    part-N.jsonl         what process N has added since; joined to the above when the task is done or goes on
    images/              the images drawn
    references/          true images that are no files of their own (frames of clips)

A line is written when its sample is finished and its images are there, so whatever is cut off can be taken up again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from ..configuration import describe_differences
from ..io import InputError, append, json_lines, parse_json, read_json, write_image, write_json, write_json_lines
from .config import EvaluationError

RUN, PREDICTIONS, PARTS = "run.json", "predictions.jsonl", "part-*.jsonl"
IMAGES, REFERENCES = "images", "references"
PART_ENDS = "asked_for"
Record = dict[str, Any]


@dataclass(frozen=True)
class Prediction:
    """What is to be written of a sample.

    Attributes:
        record: its line.
        images: those that the line names, by their paths from the folder.
    """

    record: Record
    images: Mapping[str, PIL.Image.Image] = field(default_factory=dict)


class Predictions:
    """Predictions of one task.

    Args:
        folder: of the task.
        rank: number of this process, which has a file of its own to add to.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self.path = folder, folder / PREDICTIONS
        self.part = folder / f"part-{rank}.jsonl"

    def prepare(self, identity: Callable[[int | None], Mapping[str, Any]]) -> None:
        """Make the folder, or check that it belongs to the same run and join what is there. On one process only.

        Args:
            identity: of the run with so many samples from the start, None for all; tells their `count`. A run of fewer
                samples is the same run if it began with the same ones.

        Raises:
            EvaluationError: the folder has predictions of another run, or a file of it cannot be used.
        """
        parts, whole = self.parts(), identity(None)
        self.check(identity(parts[-1]) if parts else whole)
        if not parts or parts[-1] < whole["samples"]["count"]:
            parts = [*parts, whole["samples"]["count"]]
        write_json(self.folder / RUN, {**whole, PART_ENDS: parts})
        self.join()

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuse a folder whose predictions were made with something else. What `identity` lacks is not compared.

        Raises:
            EvaluationError: names what differs.
        """
        path = self.folder / RUN
        if not path.is_file():
            if self.path.exists() or any(self.folder.glob(PARTS)):
                raise EvaluationError(f"{self.folder}: predictions without {RUN}, which says what they were made with; "
                                      "name another folder, or remove them with --overwrite")  # fmt: skip
            return
        found, wanted = _read_object(path), json.loads(json.dumps(identity))
        found = {key: value for key, value in found.items() if key in wanted}
        if different := describe_differences(found, wanted):
            raise EvaluationError(
                f"{self.folder}: these predictions are of another run: {different}. "
                "Name another folder with output=..., or replace them with --overwrite"
            )

    def parts(self) -> list[int]:
        """How many samples there were each time that more were asked for; [] if there is no run yet."""
        path = self.folder / RUN
        found = _read_object(path).get(PART_ENDS, []) if path.is_file() else []
        if not isinstance(found, list) or not all(isinstance(n, int) for n in found) or found != sorted(found):
            raise EvaluationError(f"{path}: '{PART_ENDS}' must be growing numbers of samples, not {found}; "
                                  "name another folder, or replace the predictions with --overwrite")  # fmt: skip
        return found

    def join(self) -> None:
        """Bring all lines into one file, in the order of the task; the last of a sample counts."""
        parts = sorted(self.folder.glob(PARTS))
        if not parts and self.path.exists():
            return
        records = {record["index"]: record for path in (self.path, *parts) for record in read_records(path)}
        write_json_lines(self.path, (records[index] for index in sorted(records)))
        for part in parts:
            part.unlink()

    def read(self) -> dict[int, Record]:
        """What has been joined, by number of the sample."""
        return {record["index"]: record for record in read_records(self.path)}

    def add(self, made: Sequence[Prediction]) -> None:
        """Write images as PNG, then append the lines that name them to this process's file, in one go."""
        for name, image in ((name, image) for one in made for name, image in one.images.items()):
            write_image(self.folder / name, image)
        append(self.part, json_lines(one.record for one in made))


def image_name(kind: str, index: int, slot: int) -> str:
    """Where an image of a sample lies, from the folder."""
    return f"{kind}/{index:06d}_{slot}.png"


def read_records(path: Path) -> Iterator[Record]:
    """The lines of a file of predictions; one that was cut off at the end is left out, a missing file has none.

    Raises:
        EvaluationError: another line is no prediction.
    """
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line) if line.strip() else None
        except InputError:
            if number == len(lines):  # without its line end: the process was killed while it wrote
                return
            record = line
        if record is None:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("index"), int) or "id" not in record:
            raise EvaluationError(f"{path}, line {number}: not a prediction; remove the line, and its sample is redone")
        yield record


def remove_results(folder: Path) -> None:
    """Remove what an evaluation wrote into a folder; nothing else."""
    for run in sorted(folder.glob(f"*/{RUN}")):
        for name in (RUN, PREDICTIONS, "scores.jsonl", "gallery.html"):
            (run.parent / name).unlink(missing_ok=True)
        for part in run.parent.glob(PARTS):
            part.unlink()
        for name in (IMAGES, REFERENCES, "gallery"):
            shutil.rmtree(run.parent / name, ignore_errors=True)
        if not any(run.parent.iterdir()):
            run.parent.rmdir()
    for name in ("config.yaml", "results.json", "results.md"):
        (folder / name).unlink(missing_ok=True)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, dict)
    except InputError:
        raise EvaluationError(f"{path}: damaged, so it is not known what the predictions were made with; "
                              "name another folder, or replace them with --overwrite") from None  # fmt: skip
