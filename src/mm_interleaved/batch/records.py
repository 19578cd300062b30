"""The record of a finished document: the fields of the original's results and ours, and the files of its images."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import PIL.Image

from .. import __version__
from ..document import Document, Generated, Image, Segment, Text
from ..generation import GenerationSettings
from ..io import write_image
from ..io.images import load_image
from ..pretrained import Loaded


def describe_run(loaded: Loaded, settings: GenerationSettings) -> dict[str, Any]:
    """What results depend on beside their documents."""
    return {
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "seed": settings.seed,
        "settings": dataclasses.asdict(settings),
        "version": __version__,
    }


class RecordWriter:
    """Makes records of finished documents and saves their images.

    Args:
        folder: the folder that paths of records are relative to.
        images: the folder of images in it, with a slash at its end; "": the folder itself.
    """

    def __init__(self, folder: Path, images: str = "") -> None:
        self.folder, self.images = folder, images

    def candidate_names(self, sample: int, generated: Generated) -> list[str]:
        """The paths of the candidates of an image of document number `sample`."""
        count = len(generated.candidates)
        return [f"{self.images}{sample}_{generated.turn}_{number}.png" for number in range(count)]

    def save_candidates(self, sample: int, segment: Segment) -> list[Path]:
        """Save the candidates of a generated image of document number `sample`. Returns the files written."""
        if segment.generated is None:
            return []
        paths = [self.folder / name for name in self.candidate_names(sample, segment.generated)]
        for path, image in zip(paths, segment.generated.candidates, strict=True):
            write_image(path, image)
        return paths

    def record(self, sample: int, document: Document, reason: str) -> dict[str, Any]:
        """The record of a finished document, whose candidates are saved; saves its given images that are no files."""
        results: list[str] = []
        files: list[str] = []
        for segment in document.generated:
            assert segment.generated is not None
            names = self.candidate_names(sample, segment.generated)
            results += [segment.generated.text or ""] if isinstance(segment, Text) else names
            files += names
        files += self._save_given(sample, document)
        return {
            **(document.record or {}),
            "generate_results": results,
            **({"id": document.id} if document.id is not None else {}),
            "segments": [self._entry(sample, number, segment) for number, segment in enumerate(document.segments)],
            "finish_reason": reason,
            "files": files,
        }

    def _entry(self, sample: int, number: int, segment: Segment) -> dict[str, Any]:
        """The entry of segment `number` of a document."""
        generated = segment.generated
        if isinstance(segment, Text):
            entry: dict[str, Any] = {"text": segment.text}
        elif generated is not None:
            entry = {"image": self.candidate_names(sample, generated)[0]}
        else:
            entry = {"image": self._given_path(sample, number, segment)}
        if segment.role is not None:
            entry["role"] = segment.role
        entry["generated"] = generated is not None
        if generated is not None:
            entry["turn"] = generated.turn
            if isinstance(segment, Image):
                entry["candidates"] = self.candidate_names(sample, generated)
        return entry

    def _save_given(self, sample: int, document: Document) -> list[str]:
        """Save the given images that are only in memory. Returns their paths."""
        names = []
        for number, segment in enumerate(document.segments):
            if isinstance(segment, Text) or segment.generated is not None:
                continue
            if isinstance(segment.source, PIL.Image.Image):
                names.append(self._given_path(sample, number, segment))
                write_image(self.folder / names[-1], load_image(segment.source))
        return names

    def _given_path(self, sample: int, number: int, segment: Image) -> str:
        """Path of a given image, relative to the folder of the records."""
        if isinstance(segment.source, PIL.Image.Image):
            return f"{self.images}{sample}_given_{number}.png"
        if not isinstance(segment.source, (str, Path)):
            raise TypeError(f"a given image is a file or in memory, not {segment.source!r}")
        return os.path.relpath(segment.source, self.folder.resolve())
