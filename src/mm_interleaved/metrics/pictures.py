"""Pictures as the metrics take them: in memory, or as files that are opened one batch at a time."""

from __future__ import annotations

from pathlib import Path

import PIL.Image

Picture = PIL.Image.Image | Path


def rgb(picture: Picture) -> PIL.Image.Image:
    """The picture in RGB, of its own size.

    Raises:
        ValueError: the file is missing or not a whole picture; the message has its path.
    """
    if isinstance(picture, PIL.Image.Image):
        return picture.convert("RGB")
    try:
        with PIL.Image.open(picture) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError) as error:  # what Pillow raises for damaged files
        raise ValueError(f"{picture}: cannot be read as a picture ({error})") from error
