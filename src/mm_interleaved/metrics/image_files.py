"""The images of metrics: in memory, or files that are opened one batch at a time."""

from __future__ import annotations

from pathlib import Path

import PIL.Image

from ..io.images import load_pixels

ImageLike = PIL.Image.Image | Path


def rgb(image: ImageLike) -> PIL.Image.Image:
    """The image in RGB, in its own size.

    Raises:
        InputError: the file is missing or not a complete image; the message has its path.
    """
    return load_pixels(image).convert("RGB")
