"""The files of `mmi inspect`: arrays, heat maps over the earlier images, the page, and a comparison of two images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from ..io import InputError, atomic_folder, encode_image, write_json
from .files import write_inspection
from .heat import heat_map, overlay, shares
from .page import to_html
from .records import ImageRecord, Inspection, Points, TextRecord

Box = tuple[float, float, float, float]
PAGE, HEAT, COMPARISON = "inspection.html", "heat", "comparison.json"
THIRDS = ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0))
REGIONS: list[Box] = [(x0, y0, x1, y1) for y0, y1 in THIRDS for x0, x1 in THIRDS]


@dataclass
class Unit:
    """A word of a generated text, or a region of a generated image.

    Attributes:
        segment: index of its segment in the document.
        name: the word, or the sides of the region in shares of the image.
        images: the earlier images by their number.
        points: its points: one set for a word, one for each map of the UNet for a region.
        levels: sides of the levels.
    """

    segment: int
    name: str
    images: list[int]
    points: list[Points]
    levels: list[int]

    def heat(self, slot: int, levels: Sequence[int] | None = None) -> np.ndarray:
        """The heat map of an earlier image; `levels`: sides of the levels that count, None: all."""
        return np.mean([heat_map(points, slot, self.levels, only=levels) for points in self.points], axis=0)

    def shares(self) -> dict[int, float]:
        """The share of each earlier image, by its number."""
        found = np.mean([shares(points)["images"] for points in self.points], axis=0)
        return {image: float(share) for image, share in zip(self.images, found, strict=True)}

    @property
    def ignored(self) -> float:
        """The share of the ignore slot."""
        return float(np.mean([points.ignored.mean() for points in self.points]))


def word_units(record: TextRecord, words: Sequence[str] | None = None) -> Iterator[Unit]:
    """The words of a text; `words`: only these, whatever their case."""
    wanted = None if words is None else {word.casefold() for word in words}
    for number, (begin, end) in enumerate(record.words):
        name = record.word(number)
        if wanted is None or name.casefold() in wanted:
            yield Unit(record.segment, name, record.images, [record.points[begin:end]], record.levels)


def region_units(record: ImageRecord, regions: Sequence[Box] | None = None) -> Iterator[Unit]:
    """Regions of an image, (x0, y0, x1, y1) in shares of its sides; None: 3 by 3.

    A region has the cells whose centres lie in it, and at least the one that is nearest to its centre.
    """
    for region in REGIONS if regions is None else regions:
        x0, y0, x1, y1 = region
        points = []
        for one in record.maps:
            centres = one.reference
            cells = np.flatnonzero(np.all((centres >= (x0, y0)) & (centres < (x1, y1)), axis=1))
            if not len(cells):
                cells = np.abs(centres - ((x0 + x1) / 2, (y0 + y1) / 2)).sum(1).argmin(keepdims=True)
            points.append(one.points[:, cells])
        name = ",".join(f"{side:.2f}" for side in region)
        yield Unit(record.segment, name, record.images, points, record.levels)


def units_of(
    inspection: Inspection, words: Sequence[str] | None = None, regions: Sequence[Box] | None = None
) -> list[Unit]:
    """The words and regions of all that was generated.

    Raises:
        InputError: one of `words` was not generated.
    """
    found = [unit for record in inspection.texts for unit in word_units(record, words)]
    if lacking := {word.casefold() for word in words or ()} - {unit.name.casefold() for unit in found}:
        said = dict.fromkeys(unit.name for record in inspection.texts for unit in word_units(record))
        raise InputError(f"the word '{min(lacking)}' was not generated", "words", f"Words are {', '.join(said)}")
    return found + [unit for record in inspection.images for unit in region_units(record, regions)]


def compare(units: Sequence[Unit], first: int, second: int) -> list[dict[str, object]]:
    """The shares of two earlier images for each word and region that sees both.

    Raises:
        InputError: none of them sees both.
    """
    found = []
    for unit in units:
        if first in unit.images and second in unit.images:
            both = unit.shares()
            total = both[first] + both[second]
            found.append(
                {
                    "segment": unit.segment,
                    "unit": unit.name,
                    "shares": [both[first], both[second]],
                    "ignored": unit.ignored,
                    "preference": (both[first] - both[second]) / max(total, 1e-12),
                }
            )
    if not found:
        known = sorted({image + 1 for unit in units for image in unit.images})
        raise InputError(
            f"nothing that was generated sees both image {first + 1} and image {second + 1}",
            "compare",
            f"Images before a generated text or image: {', '.join(map(str, known)) or 'none'}",
        )
    return found


def write_results(
    inspection: Inspection,
    folder: Path,
    *,
    words: Sequence[str] | None = None,
    regions: Sequence[Box] | None = None,
    levels: Sequence[int] | None = None,
    compared: tuple[int, int] | None = None,
    replace: bool = False,
) -> list[dict[str, object]]:
    """Write everything about an inspection into a folder, which appears complete or not at all.

    Args:
        inspection: what was collected.
        folder: a new folder.
        words: of the heat maps; None: all.
        regions: of the heat maps; None: 3 by 3.
        levels: sides of the levels that count in heat maps; None: all.
        compared: numbers of two images, from 0, to compare; None: no comparison.
        replace: whether a folder of that name is replaced.

    Returns:
        The comparison.

    Raises:
        InputError: there is no such word, level or image, or the page would be too large.
        OutputError: the folder exists, or cannot be written.
    """
    units = units_of(inspection, words, regions)
    known = {level for unit in units for level in unit.levels}
    if strange := sorted(set(levels or ()) - known):
        raise InputError(f"there is no level of {strange[0]}", "levels", f"Levels are {sorted(known, reverse=True)}")
    comparison = [] if compared is None else compare(units, *compared)
    page = to_html(inspection, compared)
    with atomic_folder(folder, replace=replace) as aside:
        write_inspection(inspection, aside)
        (aside / PAGE).write_text(page, "utf-8")
        (aside / HEAT).mkdir()
        for number, unit in enumerate(units):
            for slot, image in enumerate(unit.images):
                shown = overlay(inspection.views[image], unit.heat(slot, levels))
                name = re.sub(r"[^\w,.-]+", "", unit.name) or "token"
                place = aside / HEAT / f"{unit.segment}-{number:03}-{name[:40]}-image{image + 1}.png"
                place.write_bytes(encode_image(_enlarged(shown)))
        if compared is not None:
            write_json(aside / COMPARISON, {"images": [image + 1 for image in compared], "units": comparison})
    return comparison


def _enlarged(image: PIL.Image.Image) -> PIL.Image.Image:
    times = max(1, 256 // image.width)
    return image.resize((image.width * times, image.height * times), PIL.Image.Resampling.BICUBIC)
