"""ADE20K: generation of a photo from a coloured label map and a caption (docs/data_formats.md, "ADE20K")."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..document import Image, Segment, Text
from ..io import InputError, write_image
from ..io.images import load_pixels
from .base import Item, TaskType, each, given
from .files import Source, entries, get, read_json

COLORED = "annotations_with_color"
CLASSES = 150
_LEVELS = np.arange(CLASSES)
_DIGITS = np.stack([_LEVELS // 36, _LEVELS % 36 // 6, _LEVELS % 6], 1)
PALETTE = np.concatenate([np.zeros((1, 3)), 255 - 42 * _DIGITS]).astype(np.uint8)  # by label; 0 is black
_OBTAIN = (
    "Get ADEChallengeData2016, write captions as [{image_id, caption}], and colour the label maps with "
    "`mmi data prepare ade20k`"
)


def colored(labels: np.ndarray) -> PIL.Image.Image:
    """Return a label map [h, w], labels up to `CLASSES`, in the colours of `PALETTE`."""
    return PIL.Image.fromarray(PALETTE[labels])


def color_maps(folder: Path, phase: str) -> int:
    """Write the coloured maps of `annotations/<phase>/` to `annotations_with_color/<phase>/`. Returns their number.

    Existing maps are not written again.

    Raises:
        InputError: a label map cannot be read, or has labels that are not in ADE20K.
    """
    maps = sorted((folder / "annotations" / phase).glob("*.png"))
    if not maps:
        raise InputError("there are no label maps", str(folder / "annotations" / phase), _OBTAIN)
    out = folder / COLORED / phase
    for path in maps:
        if (out / path.name).exists():
            continue
        labels = np.asarray(load_pixels(path))
        if labels.ndim != 2 or labels.max() > CLASSES:
            raise InputError(f"labels must be 0 to {CLASSES} in one channel", str(path), "Fetch it again")
        write_image(out / path.name, colored(labels))
    return len(maps)


def read(source: Source) -> Iterator[Item]:
    """A coloured map, a caption, and the photo as an open slot.

    The reference has the path of the label map and how the photo is aligned with it: both are cropped to the central
    square, or (in the original, `compat`) the square image is stretched to the size of the map.
    """
    path = source.file(f"{source.phase}.json")

    def make(where: str, record: dict[str, Any], index: int) -> Iterator[Item]:
        name, caption = get(record, "image_id", str, where), get(record, "caption", str, where).strip()
        files = (f"{COLORED}/{source.phase}/{name}.png", f"images/{source.phase}/{name}.jpg",
                 f"annotations/{source.phase}/{name}.png")  # fmt: skip
        found = [source.images.find(file) for file in files]
        (shown_map, unmade), (photo, _), (labels, _) = found
        problem = next((p for _, p in found if p), "")
        if unmade and problem == unmade:
            problem += f" ({_OBTAIN})"
        shown: list[Segment] = [given(shown_map)]
        text: list[Segment] = [Text(f"{caption}.", supervise=False)]
        layout = text + shown if source.options["layout"] == "text_first" else shown + text
        reference = {"labels": str(labels), "photo": str(photo), "fit": "stretch" if source.compat else "center"}
        yield Item(name, {"scene": layout, "image": shown, "caption": caption}, reference, [Image(photo)],
                   meta={"caption": caption}, problem=problem, place=where)  # fmt: skip

    return each(entries(read_json(path), str(path)), make)


TASKS = (
    TaskType("ade20k", "photos from label maps", read, makes="image", prompt="{scene}", metrics=("miou",),
             phases=("validation", "training"), options={"layout": ("map_first", "text_first")},
             images="ade20k/ADEChallengeData2016", annotations="ade20k/ADEChallengeData2016", obtain=_OBTAIN),
)  # fmt: skip
