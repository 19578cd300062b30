"""Inspections in folders: `inspection.json` and `arrays.npz` (without pickle), and the images."""

from __future__ import annotations

import zipfile
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..document import Document, Image
from ..document.folder import Folder
from ..io import InputError, atomic_folder, encode_image, read_json, write_json
from ..io.images import load_image
from .records import ImageRecord, Inspection, MapRecord, Points, TextRecord

FORMAT = 1
RECORD, ARRAYS = "inspection.json", "arrays.npz"
_NAMES = tuple(f.name for f in fields(Points))


def save_inspection(inspection: Inspection, folder: str | Path) -> None:
    """Write an inspection into a new folder, which appears complete or not at all.

    Raises:
        OutputError: there is such a folder, or it cannot be written.
    """
    with atomic_folder(Path(folder)) as aside:
        write_inspection(inspection, aside)


def write_inspection(inspection: Inspection, folder: Path) -> None:
    """Write the files of an inspection into an existing folder."""
    arrays: dict[str, np.ndarray] = {}
    data = {
        "format": FORMAT,
        "reason": inspection.reason,
        "document": _write_document(inspection.document, folder),
        "views": [_write(view, folder, f"view-{number}.png") for number, view in enumerate(inspection.views)],
        "texts": [_text(record, number, arrays) for number, record in enumerate(inspection.texts)],
        "images": [_image(record, number, arrays) for number, record in enumerate(inspection.images)],
        "run": inspection.run,
    }
    with zipfile.ZipFile(folder / ARRAYS, "w", zipfile.ZIP_DEFLATED) as archive:  # NumPy's .npz, without pickle
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.save(file, array, allow_pickle=False)
    write_json(folder / RECORD, data)


def _write_document(document: Document, folder: Path) -> dict[str, Any]:
    """The document in JSON, with its images in files."""
    segments, number = [], 0
    for segment in document.segments:
        if isinstance(segment, Image) and not segment.is_open:
            name = _write(load_image(segment.source), folder, f"image-{number}.png")  # pyright: ignore[reportArgumentType]
            segment = replace(segment, source=name, target=None, transform=None)
            number += 1
        segments.append(segment)
    return replace(document, segments=segments, record=None, place=None).to_dict()


def _write(image: Any, folder: Path, name: str) -> str:
    (folder / name).write_bytes(encode_image(image))
    return name


def _put(points: Points, name: str, arrays: dict[str, np.ndarray]) -> str:
    for part in _NAMES:
        arrays[f"{name}.{part}"] = getattr(points, part)
    return name


def _text(record: TextRecord, number: int, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    data = asdict(replace(record, points=Points(*(np.zeros(0),) * 3)))
    return {**data, "points": _put(record.points, f"text{number}", arrays)}


def _image(record: ImageRecord, number: int, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    maps = [
        {"place": one.place, "name": one.name, "side": one.side, "rows": one.rows, "base": one.base,
         "points": _put(one.points, f"image{number}.map{one.place}", arrays)}
        for one in record.maps
    ]  # fmt: skip
    return {**asdict(replace(record, maps=[])), "maps": maps}


def load_inspection(folder: str | Path) -> Inspection:
    """The inspection that `save_inspection` wrote into a folder.

    Raises:
        InputError: a file is missing or damaged.
    """
    folder = Path(folder)
    data = read_json(folder / RECORD, dict)
    if data.get("format") != FORMAT:
        raise InputError(f"format {data.get('format')!r} is not known", str(folder / RECORD),
                         "Read it with the version that wrote it")  # fmt: skip
    try:
        with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
            texts = [
                TextRecord(**{**one, "points": _get(one["points"], arrays), "words": [tuple(w) for w in one["words"]]})
                for one in data["texts"]
            ]
            images = [
                ImageRecord(**{**one, "maps": [MapRecord(**{**m, "points": _get(m["points"], arrays)})
                                               for m in one["maps"]]})
                for one in data["images"]
            ]  # fmt: skip
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"the arrays cannot be read ({type(error).__name__}: {error})", str(folder / ARRAYS),
                         "Inspect the document again") from None  # fmt: skip
    document = Document.from_dict(data["document"], Folder(folder))
    views = [load_image(folder / name) for name in data["views"]]
    return Inspection(document, data["reason"], texts, images, views, data["run"])


def _get(name: str, arrays: Any) -> Points:
    return Points(*(arrays[f"{name}.{part}"] for part in _NAMES))
