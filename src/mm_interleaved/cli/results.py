"""The folder that `mmi generate` writes: pictures, `results.json`, `report.html`; each is there whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import PIL.Image

from .. import __version__
from ..document import Document, FileSlice, Image, Text
from ..files import write_atomic
from ..generation import DocumentFinished, GenerationSettings, SegmentFinished
from ..pretrained import Loaded
from ..processor.images import load_picture
from .report import write_report

RESULTS, REPORT = "results.json", "report.html"


class UsageError(ValueError):
    """A command that cannot be carried out as it was given."""


def _png(picture: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def refuse_occupied(folder: Path, resume: bool, overwrite: bool) -> None:
    """Do not write over results unless asked to.

    Raises:
        UsageError: the folder holds results and nothing was said about them, or two things were.
    """
    if resume and overwrite:
        raise UsageError("--resume keeps earlier results and --overwrite removes them; choose one")
    if (folder / RESULTS).exists() and not (resume or overwrite):
        raise UsageError(f"'{folder / RESULTS}' exists; continue it with --resume, replace it with --overwrite, "
                         "or name another folder")  # fmt: skip


class ResultsFolder:
    """Takes finished segments and documents and keeps the folder complete after each document.

    Args:
        folder: made if it does not exist.
        source: the input file, whose checksum tells whether a run can be resumed.
        loaded: the model, for the record: its name, the type of its weights, whether they are trained.
        settings: how things are generated.
        resume: go on where an earlier run with the same input, model and settings stopped.
        overwrite: remove what an earlier run left.

    Raises:
        UsageError: the folder cannot be written, or holds results that are in the way.
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
        self.run = {
            "model": loaded.name,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "seed": settings.seed,
            "settings": dataclasses.asdict(settings),
            "version": __version__,
            "input": source.name,
            "input_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }
        self.records: list[dict[str, Any]] = []
        self.turns: dict[int, list[tuple[str, Any]]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / ".writable", b"")
            (folder / ".writable").unlink()
        except OSError as error:
            raise UsageError(f"the folder '{folder}' cannot be written: {error.strerror}") from None
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
            if any(record.get("run") != self.run for record in records):
                raise UsageError(f"'{path}' was made from another input, model or settings; it cannot be resumed")
            self.records = records

    def _remove_earlier(self, path: Path) -> None:
        for record in _read_results(path):
            for name in record.get("files", []):
                if (self.folder / name).parent == self.folder:
                    (self.folder / name).unlink(missing_ok=True)
        path.unlink()
        (self.folder / REPORT).unlink(missing_ok=True)

    @property
    def done(self) -> int:
        """Documents that are finished already."""
        return len(self.records)

    def add_segment(self, sample: int, event: SegmentFinished) -> list[Path]:
        """Keep a finished segment of document number `sample`; the pictures written."""
        if isinstance(event.segment, Text):
            self.turns.setdefault(sample, []).append(("text", event.segment.text))
            return []
        names = [f"{sample}_{event.turn}_{number}.png" for number in range(len(event.candidates))]
        for name, picture in zip(names, event.candidates, strict=True):
            write_atomic(self.folder / name, _png(picture))
        self.turns.setdefault(sample, []).append(("image", names))
        return [self.folder / name for name in names]

    def add_document(self, sample: int, document: Document, event: DocumentFinished) -> None:
        """Keep a finished document and bring `results.json` up to date."""
        made = self.turns.pop(sample, [])
        names = iter([value[0] for kind, value in made if kind == "image"])
        given = {id(s.source) for s in document.images if s.source is not None}
        segments = []
        for number, segment in enumerate(event.result.segments):
            if isinstance(segment, Text):
                entry: dict[str, Any] = {"text": segment.text}
                generated = not any(segment is s for s in document.segments)
            else:
                generated = id(segment.source) not in given
                entry = {"image": next(names) if generated else self._given_picture(sample, number, segment)}
            if segment.role is not None:
                entry["role"] = segment.role
            segments.append({**entry, "generated": generated})
        results: list[str] = []
        for kind, value in made:
            results += [value] if kind == "text" else value
        files = [name for kind, value in made if kind == "image" for name in value]
        files += [s["image"] for s in segments if s.get("image", "").startswith(f"{sample}_given_")]
        self.records.append({
            **(document.record or {}),
            "generate_results": results,
            **({"id": document.id} if document.id is not None else {}),
            "segments": segments,
            "finish_reason": event.reason,
            "files": files,
            "run": self.run,
        })  # fmt: skip
        write_atomic(self.folder / RESULTS, (json.dumps(self.records, indent=4, ensure_ascii=False) + "\n").encode())

    def _given_picture(self, sample: int, number: int, segment: Image) -> str:
        """Path of a given picture from the results folder; one that is only in memory is saved there."""
        if isinstance(segment.source, PIL.Image.Image):
            name = f"{sample}_given_{number}.png"
            write_atomic(self.folder / name, _png(load_picture(segment.source)))
            return name
        if segment.source is None or isinstance(segment.source, FileSlice):
            raise TypeError(f"a given image is a file or in memory, not {segment.source!r}")
        return os.path.relpath(segment.source, self.folder.resolve())

    def finish(self) -> Path:
        """Write the report; its path."""
        path = self.folder / REPORT
        write_atomic(path, write_report(self.records, self.folder, self.run, self.trained).encode())
        return path


def _read_results(path: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(records, list) and all(isinstance(r, dict) for r in records):
            return records
    except (ValueError, UnicodeDecodeError):
        pass
    raise UsageError(f"'{path}' is not a results file of this command; name another folder")
