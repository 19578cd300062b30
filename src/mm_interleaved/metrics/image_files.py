"""Images as the metrics take them: in memory, or as files that are opened one batch at a time."""

from __future__ import annotations

from pathlib import Path

import PIL.Image

ImageLike = PIL.Image.Image | Path


def rgb(image: ImageLike) -> PIL.Image.Image:
    """The image in RGB, of its own size.

    Raises:
        ValueError: the file is missing or not a whole image; the message has its path.
    """
    if isinstance(image, PIL.Image.Image):
        return image.convert("RGB")
    try:
        with PIL.Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError) as error:  # what Pillow raises for damaged files
        raise ValueError(f"{image}: cannot be read as an image ({error})") from error
