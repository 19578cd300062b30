"""The folder of the predictions of a task, to which a run appends JSON lines and images.

    run.json             the settings of the predictions (a run with others is refused), and the number of samples,
                         with each later increase
    predictions.jsonl    one object per sample, in the order of the task: index, id and text, images or scores
    part-N.jsonl         new lines of process N; merged into the above when the task is finished or resumed
    images/              the generated images
    references/          reference images that are not files (frames of clips)

A line is written after the images of its sample, so an interrupted run can be resumed.
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
    """The prediction for a sample.

    Attributes:
        record: its line.
        images: the images of the line, by their paths relative to the folder.
    """

    record: Record
    images: Mapping[str, PIL.Image.Image] = field(default_factory=dict)


class Predictions:
    """Predictions of one task.

    Args:
        folder: the folder of the task.
        rank: number of this process, which appends to its own file.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self.path = folder, folder / PREDICTIONS
        self.part = folder / f"part-{rank}.jsonl"

    def prepare(self, identity: Callable[[int | None], Mapping[str, Any]]) -> None:
        """Create the folder, or check that it belongs to the same run and merge its lines. On one process only.

        Args:
            identity: returns the identity of the run for a number of samples from the start (None: all), with their
                `count`. A run of fewer samples is the same run if it has the same first samples.

        Raises:
            EvaluationError: the folder has predictions of another run, or one of its files cannot be used.
        """
        parts, whole = self.parts(), identity(None)
        self.check(identity(parts[-1]) if parts else whole)
        if not parts or parts[-1] < whole["samples"]["count"]:
            parts = [*parts, whole["samples"]["count"]]
        write_json(self.folder / RUN, {**whole, PART_ENDS: parts})
        self.join()

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuse a folder whose predictions have another identity. Keys that `identity` lacks are not compared.

        Raises:
            EvaluationError: the identities differ; the message names the keys.
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
        """The number of samples before each increase; [] if there is no run yet."""
        path = self.folder / RUN
        found = _read_object(path).get(PART_ENDS, []) if path.is_file() else []
        if not isinstance(found, list) or not all(isinstance(n, int) for n in found) or found != sorted(found):
            raise EvaluationError(f"{path}: '{PART_ENDS}' must be growing numbers of samples, not {found}; "
                                  "name another folder, or replace the predictions with --overwrite")  # fmt: skip
        return found

    def join(self) -> None:
        """Merge all lines into one file, in the order of the task. The last line of a sample is kept."""
        parts = sorted(self.folder.glob(PARTS))
        if not parts and self.path.exists():
            return
        records = {record["index"]: record for path in (self.path, *parts) for record in read_records(path)}
        write_json_lines(self.path, (records[index] for index in sorted(records)))
        for part in parts:
            part.unlink()

    def read(self) -> dict[int, Record]:
        """The merged records, by number of the sample."""
        return {record["index"]: record for record in read_records(self.path)}

    def add(self, made: Sequence[Prediction]) -> None:
        """Write images as PNG, then append their lines to the file of this process in one write."""
        for name, image in ((name, image) for one in made for name, image in one.images.items()):
            write_image(self.folder / name, image)
        append(self.part, json_lines(one.record for one in made))


def image_name(kind: str, index: int, slot: int) -> str:
    """The path of an image of a sample, relative to the folder."""
    return f"{kind}/{index:06d}_{slot}.png"


def read_records(path: Path) -> Iterator[Record]:
    """The lines of a file of predictions, without a truncated last line. A missing file has none.

    Raises:
        EvaluationError: another line is not a prediction.
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
    """Remove the files of an evaluation from a folder, and nothing else."""
    for run in sorted(folder.glob(f"*/{RUN}")):
        for name in (RUN, PREDICTIONS, "scores.jsonl", "gallery.html", "submission.json"):
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
