"""The interactive page of an inspection: one HTML file, which needs no other file.

Axes: F layers of a text or steps of an image, S tokens or cells, N heads, R images, V levels, P points.
"""

from __future__ import annotations

import base64
import html
import json
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import PIL.Image

from ..document import Text
from ..io import InputError, encode_image
from .records import ImageRecord, Inspection, Points, TextRecord
from .settings import chosen_cells

MOST_CELLS = 16  # cells of a side of a map on the page; of larger maps every second, fourth, ... cell is shown
LARGEST_MIB = 96  # what a server collects by default (128 MiB of arrays) takes 85 MiB on the page
LOW, HIGH = -1.0, 2.0  # of locations on the page; those beyond are moved to the edge
FRAME = 780  # height of the page in a notebook, in pixels


def _read(name: str) -> str:
    return (files("mm_interleaved.inspection") / "web" / name).read_text("utf-8")


@cache
def _template() -> tuple[str, str, str]:
    """Page, style and script."""
    return _read("page.html"), _read("style.css"), _read("view.js")


def to_html(inspection: Inspection, compared: tuple[int, int] | None = None) -> str:
    """The page; it begins with the comparison of two images, numbered from 0.

    Raises:
        InputError: it would be larger than `LARGEST_MIB`.
    """
    return page_of(to_json(inspection, compared))


def to_json(inspection: Inspection, compared: tuple[int, int] | None = None) -> str:
    """The data of the page as JSON text."""
    return json.dumps({**page_data(inspection), "compared": compared}, ensure_ascii=False, separators=(",", ":"))


def page_of(data: str) -> str:
    """The page with the data of `to_json`.

    Raises:
        InputError: it would be larger than `LARGEST_MIB`.
    """
    page, style, script = _template()
    # Inside of a script element "<" could end it, or begin a comment.
    parts = {"style": style, "data": data.replace("<", "\\u003c"), "script": script}
    for name, part in parts.items():
        head, _, tail = page.partition(f"{{{{ {name} }}}}")
        page = head + part + tail
    if len(page) > LARGEST_MIB * 2**20:
        raise InputError(f"the page takes {len(page) / 2**20:.0f} MiB, more than {LARGEST_MIB}",
                         fix="Inspect fewer layers, heads, places, steps or cells")  # fmt: skip
    return page


def to_frame(inspection: Inspection) -> str:
    """The page in a frame of its own, for notebooks."""
    return (f'<iframe sandbox="allow-scripts" title="Where MMFS looks" width="100%" height="{FRAME}" '
            f'style="border: 0" srcdoc="{html.escape(to_html(inspection))}"></iframe>')  # fmt: skip


def page_data(inspection: Inspection) -> dict[str, Any]:
    """The data of the page, as JSON; arrays are 16-bit integers in base64."""
    records: list[TextRecord | ImageRecord] = [*inspection.texts, *inspection.images]
    by_segment = {record.segment: number for number, record in enumerate(records)}
    segments, images = [], 0
    for place, segment in enumerate(inspection.document.segments):
        shown: dict[str, Any] = {"role": segment.role, "record": by_segment.get(place)}
        shown["given"] = segment.generated is None  # what was generated has no record where none was collected
        if isinstance(segment, Text):
            shown |= {"kind": "text", "text": segment.text or ""}
        else:
            shown |= {"kind": "image", "image": images}
            images += 1
        segments.append(shown)
    return {
        "about": about(inspection),
        "segments": segments,
        "views": [_url(view) for view in inspection.views],
        "records": [_text(r) if isinstance(r, TextRecord) else _image(r) for r in records],
    }


def about(inspection: Inspection) -> str:
    """What was inspected, in a sentence."""
    tokens, images = sum(len(r.ids) for r in inspection.texts), len(inspection.images)
    settings = inspection.run.get("settings", {})
    seed = f", seed {settings['seed']}" if "seed" in settings else ""
    return f"{tokens} generated tokens and {images} generated image{'' if images == 1 else 's'}{seed}"


def _url(image: PIL.Image.Image) -> str:
    kind = "PNG" if image.width <= 160 else "JPEG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encode_image(image, kind, quality=90)).decode()}"


def _text(record: TextRecord) -> dict[str, Any]:
    # The page has the axis that is chosen first: layers of a text, steps of an image.
    points = Points(*(np.swapaxes(x, 0, 1) for x in vars(record.points).values()))
    return {
        "kind": "text", "pieces": record.pieces, "words": record.words, "images": record.images,
        "layers": record.layers, "heads": record.heads, "levels": record.levels, "blocks": [_block(points)],
    }  # fmt: skip


def _image(record: ImageRecord) -> dict[str, Any]:
    blocks = []
    for one in record.maps:
        rows = np.array(chosen_cells(len(one.rows), MOST_CELLS))
        cells = (rows[:, None] * len(one.rows) + rows).reshape(-1)
        name = f"{one.side} \u00d7 {one.side}, {one.name}"
        blocks.append({**_block(one.points[:, cells]), "side": one.side, "rows": [one.rows[row] for row in rows],
                       "name": name})  # fmt: skip
    return {
        "kind": "image", "image": record.image, "images": record.images, "steps": record.steps, "total": record.total,
        "timesteps": record.timesteps, "heads": record.heads, "levels": record.levels, "blocks": blocks,
    }  # fmt: skip


def _block(points: Points) -> dict[str, Any]:
    """Points with the first axes [F, S]."""
    units, heads = points.ignored.shape[1:]
    images, levels, count = points.weights.shape[-3:]
    return {
        "units": units, "heads": heads, "images": images, "levels": levels, "points": count, "low": LOW, "high": HIGH,
        "locations": _pack((points.locations - LOW) / (HIGH - LOW)), "weights": _pack(points.weights),
        "ignored": _pack(points.ignored),
    }  # fmt: skip


def _pack(values: np.ndarray) -> str:
    """Values in [0, 1] as little-endian 16-bit integers in base64."""
    return base64.b64encode((values.clip(0, 1) * 65535 + 0.5).astype("<u2").tobytes()).decode()
