"""`report.html`: the documents of a run as one HTML file with all images inline."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import PIL.Image
from jinja2 import Environment, PackageLoader

from ..io import encode_image
from ..io.images import load_image

SHOWN_SIDE = 640  # longest side of an image in the report, in pixels


def image_url(image: PIL.Image.Image) -> str:
    """The image, reduced to at most `SHOWN_SIDE` pixels, as the URL of an HTML file that needs no other file."""
    image = image.copy()
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), PIL.Image.Resampling.LANCZOS)
    kind = "PNG" if image.width * image.height <= 256 * 256 else "JPEG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encode_image(image, kind, quality=88)).decode()}"


def write_report(records: list[dict[str, Any]], folder: Path, run: dict[str, Any], trained: bool) -> str:
    """The page for the records of a results folder; text in it is escaped."""
    documents = []
    for number, record in enumerate(records):
        segments = []
        for segment in record["segments"]:
            shown = dict(segment)
            if "image" in segment:
                shown["url"] = image_url(load_image(folder / segment["image"]))
                shown["others"] = [image_url(load_image(folder / name)) for name in segment.get("candidates", [])[1:]]
            segments.append(shown)
        documents.append({
            "number": number + 1,
            "name": record.get("id"),
            "segments": segments,
            "reason": record["finish_reason"],
        })  # fmt: skip
    environment = Environment(loader=PackageLoader("mm_interleaved.cli"), autoescape=True)
    return environment.get_template("report.html").render(documents=documents, run=run, trained=trained)
