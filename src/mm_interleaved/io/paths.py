"""Resolves file names that stand in files. They must stay in their folder; symbolic links in it may point anywhere."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .text import check_text


@dataclass(frozen=True)
class FileSlice:
    """A part of a larger file, such as an image in a tar archive.

    Attributes:
        path: the file.
        offset: where it starts there, in bytes.
        length: its bytes.
    """

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """Its bytes; fewer than `length` if the file is truncated."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    def __str__(self) -> str:
        return f"{self.path}@{self.offset}"


def resolve_inside(root: Path, name: Any, where: str = "", limit: Path | None = None) -> Path:
    """The path of the file `name`, which must stay in the folder `root`.

    Only the name is checked: a name with `..` or an absolute name is refused if it points outside the folder. The
    returned path has no `..`. Symbolic links in the folder may point anywhere, unless there is a `limit`.

    Args:
        root: the folder that relative names are relative to.
        name: the name in the file.
        where: the place to name in errors.
        limit: for files from other people, the folder that the path must stay in after symbolic links are followed; the
            name may then leave `root`.

    Raises:
        InputError: it is not a file name, it is a URL, or it points outside the folder.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise InputError(f"{name!r} is no name of a file", where, "Give a path", "without a name")
    check_text(name, where)
    if "://" in name:
        raise InputError(f"'{name[:200]}' is a URL", where, "Files are not fetched; download it and give its path",
                         "is a URL")  # fmt: skip
    normal = os.path.normpath(name)
    if limit is None and not os.path.isabs(normal) and not normal.startswith(".."):
        return root / normal
    path = _resolved(root / name)
    if not path.is_relative_to(_resolved(limit or root)):
        raise InputError(f"'{name}' lies outside the folder {limit or root}", where, "Move it there",
                         "outside its folder")  # fmt: skip
    return path


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # circular links, a name that is too long
        return path


def find_file(root: Path, name: Any, where: str = "", limit: Path | None = None) -> Path:
    """As `resolve_inside`, for a file that must exist.

    Raises:
        InputError: as `resolve_inside`, or the file does not exist.
    """
    path = resolve_inside(root, name, where, limit)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            raise InputError(f"'{name}' is a folder", where, "Give the path of a file", "is a folder")
        # is_file is also False for circular links
        looped = _is_loop(path)
        problem = f"'{name}' is a link that goes round in circles" if looped else f"the file '{name}' does not exist"
    except OSError as error:  # a name that is too long
        problem = f"'{name[:60]}...' is no path: {error.strerror}"
    raise InputError(problem, where, f"Paths are relative to {root}", "missing")


def _is_loop(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False
