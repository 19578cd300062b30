"""The output folder of `mmi generate`: images, `results.json` and `report.html`, each written atomically.

A record of `results.json` has the fields of the original's results. For every segment of the finished document it has
the text or the path of the image and whether it was generated; for a generated one also the turn and all candidates.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from ..batch.records import RecordWriter, describe_run
from ..configuration import describe_differences
from ..document import Document, Segment
from ..generation import GenerationSettings
from ..io import InputError, check_list, read_json, write_atomic, write_json
from ..pretrained import Loaded
from .errors import UsageError
from .report import write_report

RESULTS, REPORT = "results.json", "report.html"
SHARED_RUN = "run.json"  # of `batch.shared`


def refuse_occupied(folder: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder with results, unless one of `resume` and `overwrite` is set.

    Raises:
        UsageError: the folder has results and neither is set, or both are set.
    """
    if resume and overwrite:
        raise UsageError("--resume keeps earlier results and --overwrite removes them; choose one")
    if os.path.exists(folder / SHARED_RUN):
        raise UsageError(f"'{folder}' has the work of processes that share it; continue it with --shared, "
                         "or name another folder")  # fmt: skip
    if os.path.exists(folder / RESULTS) and not (resume or overwrite):
        raise UsageError(f"'{folder / RESULTS}' exists; continue it with --resume, replace it with --overwrite, "
                         "or name another folder")  # fmt: skip


class ResultsFolder:
    """Saves each image and each document as soon as it is finished. `results.json` is complete after each document.

    Args:
        folder: the output folder; created if necessary.
        source: the input file; its checksum decides whether a run can be resumed.
        loaded: the model, whose name, weight type and state (trained or not) are written.
        settings: the settings of generation.
        resume: continue an earlier run with the same input, model and settings.
        overwrite: remove earlier results.

    Raises:
        UsageError: the folder cannot be written, or has results that may not be replaced.
    """

    def __init__(
        self,
        folder: Path,
        source: Path,
        loaded: Loaded,
        settings: GenerationSettings,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.trained = folder, loaded.trained
        self._writer = RecordWriter(folder)
        self.run = {
            **describe_run(loaded, settings),
            "input": source.name,
            "input_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }
        self.records: list[dict[str, Any]] = []
        self._take_over(resume, overwrite)

    def _take_over(self, resume: bool, overwrite: bool) -> None:
        path = self.folder / RESULTS
        if not path.exists():
            return
        refuse_occupied(self.folder, resume, overwrite)
        if overwrite:
            self._remove_earlier(path)
        else:
            records = _read_results(path)
            for record in records:
                if different := describe_differences(record.get("run"), self.run):
                    raise UsageError(f"'{path}' was made from another input, model or settings ({different}); "
                                     "it cannot be resumed, but --overwrite replaces it")  # fmt: skip
            self.records = [with_candidates(record) for record in records]

    def _remove_earlier(self, path: Path) -> None:
        for record in _read_results(path):
            for name in record.get("files", []):
                if (self.folder / name).parent == self.folder:
                    (self.folder / name).unlink(missing_ok=True)
        path.unlink()
        (self.folder / REPORT).unlink(missing_ok=True)

    @property
    def done(self) -> int:
        """The number of finished documents."""
        return len(self.records)

    def save_candidates(self, sample: int, segment: Segment) -> list[Path]:
        """Save the candidates of a generated image of document number `sample`. Returns the files written."""
        return self._writer.save_candidates(sample, segment)

    def add_document(self, sample: int, document: Document, reason: str) -> None:
        """Add a finished document, whose candidates are saved, to `results.json`."""
        self.records.append({**self._writer.record(sample, document, reason), "run": self.run})
        write_json(self.folder / RESULTS, self.records, indent=4)

    def finish(self) -> Path:
        """Write the report. Returns its path."""
        path = self.folder / REPORT
        write_atomic(path, write_report(self.records, self.folder, self.run, self.trained))
        return path


def _read_results(path: Path) -> list[dict[str, Any]]:
    try:
        return check_list(read_json(path), dict, str(path))
    except InputError as error:
        raise UsageError(
            f"'{path}' is not a results file of this command ({error.problem}); name another folder"
        ) from None


def with_candidates(record: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 0.1.0, whose segments lack `turn` and `candidates`, to the current format.

    Its `generate_results` lists every turn: one entry for a text, and for an image as many as the settings state.
    """
    segments, begin, turn = [], 0, 0
    for segment in record["segments"]:
        if segment["generated"] and "turn" not in segment:
            many = record["run"]["settings"]["image"]["num_candidates"] if "image" in segment else 1
            entry = {**segment, "turn": turn}
            if "image" in segment:
                entry["candidates"] = record["generate_results"][begin : begin + many]
            segment, begin, turn = entry, begin + many, turn + 1
        segments.append(segment)
    return {**record, "segments": segments}
