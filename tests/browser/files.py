"""Files that a user drops or pastes."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import PIL.Image

if TYPE_CHECKING:
    from playwright.sync_api import Page

_TRANSFER = """
([data, type, name]) => {
    const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, { type }));
    EVENT
}
"""


def png(size: tuple[int, int] = (40, 30), color: tuple[int, int, int] = (200, 40, 40)) -> bytes:
    """An image of one colour."""
    file = io.BytesIO()
    PIL.Image.new("RGB", size, color).save(file, "png")
    return file.getvalue()


PNG = png()


def _send(page: Page, event: str, data: bytes, kind: str, name: str) -> None:
    page.evaluate(_TRANSFER.replace("EVENT", event), [base64.b64encode(data).decode(), kind, name])


def drop(page: Page, data: bytes, kind: str, name: str) -> None:
    """Drop a file at the end of the page, and wait until the page has taken it."""
    event = "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, bubbles: true, clientY: 1e5}));"
    _send(page, event, data, kind, name)
    page.wait_for_timeout(150)


def paste(page: Page, data: bytes, kind: str, name: str = "image.png") -> None:
    """Paste a file into what has the focus."""
    target = "document.activeElement.dispatchEvent"
    _send(page, f"{target}(new ClipboardEvent('paste', {{clipboardData: transfer, bubbles: true}}));", data, kind, name)
