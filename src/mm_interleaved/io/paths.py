"""Names in files become paths: a name may not leave the folder that it belongs to, links may."""

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
        """Its bytes; fewer if the file ends too soon."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    def __str__(self) -> str:
        return f"{self.path}@{self.offset}"


def resolve_inside(root: Path, name: Any, where: str = "", limit: Path | None = None) -> Path:
    """The path that a file means by `name`, which may not leave the folder.

    The name decides: `..` and absolute names that lead out are refused, and the path that is returned holds no `..`.
    Symbolic links inside the folder are the user's own and are followed wherever they lead, unless there is a `limit`.

    Args:
        root: the folder where relative names start.
        name: as it stands in the file.
        where: the place to name in errors.
        limit: for files of others, a folder that links may not leave either; names may leave `root` then.

    Raises:
        InputError: it is no name, a URL, or leads out of the folder.
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
    except (OSError, RuntimeError):  # links that go round in circles, a name that is too long
        return path


def find_file(root: Path, name: Any, where: str = "", limit: Path | None = None) -> Path:
    """The existing file that a file means by `name`; arguments as of `resolve_inside`.

    Raises:
        InputError: as `resolve_inside`, or there is no such file.
    """
    path = resolve_inside(root, name, where, limit)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            raise InputError(f"'{name}' is a folder", where, "Give the path of a file", "is a folder")
        # is_file is False for links that go round in circles, too
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
