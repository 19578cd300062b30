"""A document as HTML, for notebooks: texts are escaped, images are small and inline."""

from __future__ import annotations

import base64
import html
from typing import TYPE_CHECKING, cast

import PIL.Image

from ..io import InputError, encode_image
from ..io.images import ImageSource, load_image
from .segments import Image, Text

if TYPE_CHECKING:
    from .document import Document

SIDE = 192  # most pixels of a side of an image
MOST_IMAGES = 32
MOST_CHARACTERS = 20_000  # of a text
SLOT = "border: 1px dashed currentColor; border-radius: 4px; padding: 2px 8px; opacity: .7"
MADE = "border-left: 3px solid #b4552d; padding-left: 8px"


def to_html(document: Document) -> str:
    """The document; open slots are dashed, and what a model generated has a coloured edge."""
    parts: list[str] = []
    shown = 0
    for segment in document.segments:
        role = f"<small>{html.escape(segment.role)}</small><br>" if segment.role else ""
        style = f' style="{MADE}"' if segment.generated is not None else ""
        if isinstance(segment, Text):
            content = _text(segment)
        elif shown < MOST_IMAGES or segment.is_open:
            content, shown = _image(segment), shown + (not segment.is_open)
        else:
            content = "<em>a further image</em>"
        parts.append(f"<div{style}>{role}{content}</div>")
    name = f"<strong>{html.escape(document.id)}</strong>" if document.id else ""
    rows = "".join(f'<div style="margin: 6px 0">{part}</div>' for part in parts) or "<em>an empty document</em>"
    return f'<div style="max-width: 46em">{name}{rows}</div>'


def _text(segment: Text) -> str:
    if segment.text is None:
        return f'<span style="{SLOT}">text to generate</span>'
    text = segment.text[:MOST_CHARACTERS] + ("\u2026" if len(segment.text) > MOST_CHARACTERS else "")
    return f'<span style="white-space: pre-wrap">{html.escape(text)}</span>'


def _image(segment: Image) -> str:
    shown = [f'<span style="{SLOT}">image to generate</span>' if segment.is_open else _thumbnail(segment.source)]
    if segment.target is not None:
        shown.append(f"<small>to generate:</small> {_thumbnail(segment.target)}")
    return " ".join(shown)


def _thumbnail(source: object) -> str:
    """An image, or why it cannot be shown."""
    try:
        image = load_image(cast(ImageSource, source), draft=SIDE)
    except InputError as error:
        return f"<em>{html.escape(str(error))}</em>"
    image = image.copy()
    image.thumbnail((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
    kind = "PNG" if image.width * image.height <= 64 * 64 else "JPEG"
    data = base64.b64encode(encode_image(image, kind, quality=85)).decode()
    name = html.escape(str(source)) if not isinstance(source, PIL.Image.Image) else "image"
    return f'<img alt="{name}" title="{name}" src="data:image/{kind.lower()};base64,{data}">'
