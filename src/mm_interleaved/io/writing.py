"""Atomic writing of files and folders, and locks for folders that one process at a time may write into."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .errors import OutputError, UserError
from .text import check_text

if TYPE_CHECKING:
    import PIL.Image

logger = logging.getLogger(__name__)

LOCK = ".lock"


class writing:
    """Raise errors of the block, which writes `path`, as an `OutputError`.

    Args:
        path: the file or folder.

    Raises:
        OutputError: the disk is full, or the path cannot be written. Libraries raise various errors when the disk is
            full, so the free space is checked as well.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, UserError):
            return
        folder, number = _existing(self.path), getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or (number is None and (_mentions_full(error) or _is_full(folder))):
            raise OutputError(f"no space left in {folder}", str(self.path),
                              "Free some space; the same command resumes", "no space") from None  # fmt: skip
        if isinstance(error, OSError):
            file = next((p for p in (self.path, *self.path.parents) if os.path.isfile(p)), None)
            in_the_way = file is not None and number in (errno.EEXIST, errno.ENOTDIR)
            reason = f"'{file}' is a file" if in_the_way else error.strerror or error
            raise OutputError(f"cannot be written: {reason}", str(self.path),
                              "Name another place", "unwritable") from None  # fmt: skip


def _existing(path: Path) -> Path:
    """The innermost existing folder of `path`."""
    for folder in path.absolute().parents:
        if os.path.isdir(folder):
            return folder
    return Path("/")


def _mentions_full(error: Exception) -> bool:
    return any(words in str(error) for words in ("No space left on device", "Disk quota exceeded", "os error 28"))


def _is_full(folder: Path) -> bool:
    try:
        usage = shutil.disk_usage(folder)  # /proc has no size
    except OSError:
        return False
    return usage.total > 0 and usage.free < 1 << 16


def _aside(path: Path) -> Path:
    """The temporary name under which a file is written, in the same folder; one per process and thread."""
    return path.with_name(f".{path.name[:80]}.{os.getpid()}.{threading.get_ident()}")


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that it is never incomplete. Missing folders are created.

    Raises:
        OutputError: it cannot be written; the temporary file is removed.
        InputError: the text has a lone surrogate.
    """
    path = Path(path)
    data = content if isinstance(content, bytes) else check_text(content, str(path)).encode()
    aside = _aside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(data)
            aside.replace(path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


def write_json(path: str | Path, data: Any, indent: int | None = 2) -> None:
    """Write a JSON file in UTF-8, as `write_atomic`."""
    write_atomic(path, json.dumps(data, indent=indent, ensure_ascii=False) + "\n")


def write_json_lines(path: str | Path, records: Iterable[Any]) -> None:
    """Write a JSON-lines file in UTF-8, as `write_atomic`."""
    write_atomic(path, json_lines(records))


def json_lines(records: Iterable[Any]) -> str:
    """The records as JSON, one per line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def encode_image(image: PIL.Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Encode an image as the bytes of a file."""
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_image(path: str | Path, image: PIL.Image.Image, quality: int = 88) -> None:
    """Write a JPEG file (`.jpg`) or a PNG file (any other name), as `write_atomic`."""
    is_jpeg = Path(path).suffix in (".jpg", ".jpeg")
    write_atomic(path, encode_image(image, "JPEG", quality=quality) if is_jpeg else encode_image(image))


def append(path: str | Path, text: str) -> None:
    """Append text to a file and wait until it is on the disk.

    Raises:
        OutputError: it cannot be written; the file is restored to its former length.
    """
    data = check_text(text, str(path)).encode()
    with writing(path), open(path, "ab") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, size)
            raise


@contextmanager
def atomic_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A new folder that is renamed to `target` when the block succeeds, and removed when it fails.

    Args:
        target: its final path.
        replace: whether an existing folder of that name is replaced.

    Raises:
        OutputError: the target exists and is not an empty folder, or cannot be written.
    """
    target = Path(target)
    aside = target.with_name(target.name + ".incomplete")
    with writing(target):
        if not replace and target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise OutputError("exists already", str(target), "Name a new folder", "exists")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            yield aside
            put_in_place(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def put_in_place(aside: Path, target: Path) -> None:
    """Rename a finished folder to `target`. An existing folder is replaced, and restored if the renaming fails."""
    if not target.exists():
        aside.rename(target)
        return
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def lock_fresh_folder(folder: Path, is_begun: Callable[[], bool]) -> Iterator[None]:
    """As `lock_folder`; if the block is refused before it has begun, nothing is left of what it wrote there.

    Args:
        folder: the folder, created if necessary.
        is_begun: whether the block has written what is worth keeping. An `InputError`, or another `ValueError`, before
            that is a refusal; after other errors all files stay.

    Raises:
        OutputError: as `lock_folder`.
    """
    created = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        with lock_folder(folder):
            before = {path for path in folder.rglob("*") if path.name != LOCK}
            try:
                yield
            except ValueError:
                if not is_begun():
                    new = [path for path in folder.rglob("*") if path not in before and path.name != LOCK]
                    for path in sorted(new, reverse=True):  # what is in a folder before the folder
                        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
                raise
    except ValueError:
        for path in created:
            with suppress(OSError):  # it is not empty
                path.rmdir()
        raise


@contextmanager
def lock_folder(folder: Path, required: bool = False) -> Iterator[None]:
    """Lock a folder, created if necessary, so that no other process writes into it. Released when the process ends.

    Args:
        folder: the folder.
        required: whether a file system without locks is an error, and not a warning.

    Raises:
        OutputError: another process, which the message names, has locked it (kind "in use"), it cannot be written, or
            it cannot be locked and must be.
    """
    path = Path(folder) / LOCK
    with writing(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        while (lock := _take_lock(path, required)) is None:
            pass  # the other process removed the file after it was opened here and before it was locked
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _take_lock(path: Path, required: bool) -> int | None:
    """The lock file, open and locked; None: the file was removed."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 200).decode(errors="replace") or "another process"
        os.close(lock)
        raise OutputError(f"in use by {holder}", str(path.parent), "Wait until it ends, or name another folder",
                          "in use") from None  # fmt: skip
    except OSError as error:  # a file system without locks
        if required:
            os.close(lock)
            raise OutputError(f"files cannot be locked here ({error.strerror})", str(path.parent),
                              "Use another file system, or give each process its own part of the work",
                              "no locks") from None  # fmt: skip
        logger.warning("%s cannot be locked (%s): let only one process write there", path.parent, error.strerror)
        return lock
    try:
        if not os.path.samestat(os.fstat(lock), path.stat()):
            raise FileNotFoundError
    except FileNotFoundError:
        os.close(lock)
        return None
    os.truncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock
