"""Resolves the paths and data URLs of the images in a document."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from ..io import InputError, check_type, find_file
from ..io.images import open_image

MISSING, OUTSIDE = "missing", "outside its folder"  # kinds of errors about files


@dataclass(frozen=True)
class Folder:
    """The folder that the paths of a file are relative to, and the folder that they must stay in.

    Attributes:
        base: the folder that paths are relative to; None: paths are not checked.
        limit: for documents from other people, the folder that paths must stay in after symbolic links are followed;
            None: paths must stay in `base`, and symbolic links in it may point anywhere.
        others: folders to look in for relative paths that are not in `base`; such a path must stay in that folder.
    """

    base: Path | None = None
    limit: Path | None = None
    others: tuple[Path, ...] = ()

    def image(self, text: Any, where: str) -> Path | PIL.Image.Image:
        """The image that `text` names: the path of an existing file, or the image of a data URL.

        Raises:
            InputError: the file does not exist or is outside the folder, or the URL is not a data URL.
        """
        text = check_type(text, str, where, "Give the path of an image, or null for a slot to fill")
        if text.startswith("data:"):
            return _inline_image(text, where)
        if self.base is None:
            return Path(text)
        try:
            return find_file(self.base, text, where, self.limit)
        except InputError as error:
            if (found := self._elsewhere(text)) is not None:
                return found
            stays = not Path(text).is_absolute() and ".." not in Path(text).parts
            if error.kind == OUTSIDE and not (stays and self.others):
                error = InputError(error.problem, where, f"{error.fix}, or allow a wider folder with --image-root")
            elif error.kind in (MISSING, OUTSIDE) and self.others:
                places = ", ".join(dict.fromkeys(f"'{place}'" for place in (self.base, *self.others)))
                problem = error.problem if error.kind == MISSING else f"the file '{text}' does not exist"
                error = InputError(problem, where, f"Looked in {places}. Correct the path, or name the folder "
                                   "with --image-root", MISSING)  # fmt: skip
            raise error from None

    def _elsewhere(self, text: str) -> Path | None:
        """The file in one of the other folders; None: in none."""
        for folder in self.others:
            try:
                return find_file(folder, text, "", folder)
            except InputError:
                continue
        return None


def _inline_image(url: str, where: str) -> PIL.Image.Image:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise InputError("the data URL is not base64", where, "Write data:image/png;base64,...")
    try:
        return open_image(base64.b64decode(payload, validate=True))
    except ValueError:
        raise InputError("the data URL holds no image that can be read", where,
                         "Write data:image/png;base64,... with all of a PNG or JPEG") from None  # fmt: skip
