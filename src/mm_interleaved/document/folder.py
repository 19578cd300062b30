"""Where the images that a document names may lie."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from .checks import check
from .errors import UNREADABLE_IMAGE, DocumentError


@dataclass(frozen=True)
class Folder:
    """Where the relative paths of a file start, and the folder that no path may leave.

    Attributes:
        base: the folder of the file; None: paths are taken as they are and not checked.
        limit: the folder that paths must stay in; None: `base`.
    """

    base: Path | None = None
    limit: Path | None = None

    def image(self, text: Any, where: str) -> Path | PIL.Image.Image:
        """The image that `text` names: the path of an existing file, or the image of a data URL.

        Raises:
            DocumentError: there is no such file, or it lies outside the folder, or the URL is not a data URL.
        """
        text = check(text, str, where, "Give the path of an image, or null for a slot to fill")
        if text.startswith("data:"):
            return _inline_image(text, where)
        if "://" in text:
            raise DocumentError(f"'{text}' is a URL", where, "Images are not fetched; download it and give its path")
        if "\0" in text:
            raise DocumentError("the path holds a null character", where, "Remove it")
        if self.base is None:
            return Path(text)
        try:
            path, limit = (self.base / text).resolve(), (self.limit or self.base).resolve()
            there = path.is_file()
        except (OSError, RuntimeError) as error:  # a name that is too long; links that go round in circles
            reason = getattr(error, "strerror", None) or "its links go round in circles"
            raise DocumentError(f"'{text[:60]}...' is no path: {reason}", where, "Check the path") from None
        if not path.is_relative_to(limit):
            raise DocumentError(
                f"'{text}' lies outside the folder {limit}", where,
                "Move the image there, or allow a wider folder with --image-root",
            )  # fmt: skip
        if not there:
            raise DocumentError(f"the file '{text}' does not exist", where, f"Paths are relative to {self.base}")
        return path


def _inline_image(url: str, where: str) -> PIL.Image.Image:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise DocumentError("the data URL is not base64", where, "Write data:image/png;base64,...")
    try:
        return PIL.Image.open(io.BytesIO(base64.b64decode(payload, validate=True)))
    except (*UNREADABLE_IMAGE, PIL.Image.DecompressionBombError):
        raise DocumentError("the data URL holds no image that can be read", where,
                            "Write data:image/png;base64,... with all of a PNG or JPEG") from None  # fmt: skip
