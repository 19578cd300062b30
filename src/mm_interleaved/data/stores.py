"""Files of object stores and of HTTP servers, through fsspec and a local cache of bounded size.

A file is fetched whole and then read like a local one, so all formats work alike, and a tar archive is read in one
request. Images in it keep their place there: if the cache has removed the archive, it is fetched again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem

from ..document import Folder
from ..io import FileSlice, InputError, UserError, check_type, resolve_inside, writing
from .report import DataError

if TYPE_CHECKING:
    from .config import StoreConfig

T = TypeVar("T")
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}  # by protocol
_IN_USE = 10.0  # seconds in which a file that was asked for is not removed from the cache, so that it can be opened
_LONGEST_WAIT = 30.0  # seconds between two tries
_DENIED = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "RefreshError",
    "DefaultCredentialsError",
)
log = logging.getLogger(__name__)


class StoreError(UserError):
    """A store that gives no access or no answer. Not an `InputError`: readers skip bad records, but not these."""


def is_url(path: str) -> bool:
    """Whether a path is a URL of a store or server."""
    return "://" in path


class _Waited:
    """Seconds that this process has waited for stores."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add the time of the block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begin


waited = _Waited()


class Store:
    """A folder of a store or server.

    Args:
        url: its URL, such as `s3://bucket/folder` or `https://host/folder`.
        config: the cache and the tries.

    Raises:
        DataError: the URL has no protocol that fsspec knows, or its package is not installed.
    """

    def __init__(self, url: str, config: StoreConfig) -> None:
        self.url, self.config = url.rstrip("/"), config
        self.protocol = url.partition("://")[0]
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache = base / "mm_interleaved" / "data" if config.cache is None else Path(config.cache)
        self.limit = int(config.cache_gib * 2**30)
        self._files: dict[str, tuple[Path, str]] = {}  # by name: its copy, and its version
        self._open()

    def __str__(self) -> str:
        return self.url

    def _open(self) -> tuple[AbstractFileSystem, str]:
        """The file system in this process, and the path of the folder there. fsspec keeps file systems for reuse."""
        if "::" in self.url:
            raise DataError(
                f"'{self.url}' is a chain of file systems", fix="Give the URL of one; files are cached anyway"
            )
        try:
            return url_to_fs(self.url, **self.config.options)
        except (ImportError, ValueError) as error:
            extra = EXTRAS.get(self.protocol)
            fix = (
                f"pip install 'mm-interleaved[{extra}]'"
                if extra
                else "Check the URL, or install fsspec's package for it"
            )
            raise DataError(f"'{self.url}' cannot be opened: {error}", fix=fix) from None

    def _path(self, name: str) -> str:
        """The path of a file for the file system."""
        encoded = quote(name) if self.protocol in ("http", "https") else name
        return f"{self._open()[1].rstrip('/')}/{encoded}"

    # ---- files

    def fetch(self, name: str) -> Path | None:
        """The local copy of a file; None: the store has no such file.

        Raises:
            StoreError: the store gives no access or no answer, or the file is larger than the cache, or has changed
                since this process fetched it first.
        """
        known = self._files.get(name)
        if known is not None:
            try:
                os.utime(known[0])  # the cache removes what was not used for the longest time
            except FileNotFoundError:
                log.info("%s/%s was removed from the cache and is fetched again", self.url, name)
            else:
                return known[0]
        with waited.measured():
            try:
                size, version = self._describe(name)
            except FileNotFoundError:
                return None
            if known is not None and known[1] != version:
                raise StoreError("the file has changed since it was first read", f"{self.url}/{name}",
                                 "Start the run again; shards in use must not change")  # fmt: skip
            path = self._fetched(name, size, version)
        self._files[name] = path, version
        return path

    def size(self, name: str) -> int | None:
        """The size of a file; None: the store has no such file, or does not say.

        Raises:
            StoreError: the store gives no access or no answer.
        """
        try:
            return self._describe(name)[0]
        except FileNotFoundError:
            return None

    def _describe(self, name: str) -> tuple[int | None, str]:
        """The size and the version of a file."""
        found = self._tried(name, lambda: self._open()[0].info(self._path(name)))
        if found.get("type") == "directory":
            raise FileNotFoundError(name)
        marks = [str(found[key]) for key in ("ETag", "etag", "LastModified", "mtime", "created") if found.get(key)]
        return found.get("size"), ", ".join([str(found.get("size")), *marks])

    def _fetched(self, name: str, size: int | None, version: str) -> Path:
        """The path of the copy, which is fetched unless the cache has it."""
        if size is not None and size > self.limit:
            raise StoreError(f"it has {size / 2**30:.1f} GiB, and the cache holds {self.limit / 2**30:.1f} GiB",
                             f"{self.url}/{name}", "Set a larger 'store.cache_gib', or write smaller shards"
                             )  # fmt: skip
        key = hashlib.sha256(f"{self.url}/{name}\n{version}".encode()).hexdigest()[:32]
        target = self.cache / key / Path(name).name
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target.parent / ".lock"):  # processes of one machine fetch a file once
                if not target.is_file():
                    aside = target.with_name(f".{os.getpid()}.part")
                    try:
                        self._tried(name, lambda: self._get(name, aside, size))
                        aside.replace(target)
                    except FileNotFoundError:
                        raise StoreError("it was removed while it was fetched", f"{self.url}/{name}",
                                         "Restore it, or leave it out of 'shards'") from None  # fmt: skip
                    finally:
                        aside.unlink(missing_ok=True)
                    self._make_room(target)
        os.utime(target)
        return target

    def _get(self, name: str, aside: Path, size: int | None) -> None:
        self._open()[0].get_file(self._path(name), str(aside))
        got = aside.stat().st_size
        if size is not None and got != size:
            raise TimeoutError(f"{got} of {size} bytes arrived")

    def _make_room(self, kept: Path) -> None:
        """Remove the files that were not used for the longest time until the cache is as small as it must be."""
        found = []
        for path in self.cache.glob("*/[!.]*"):
            try:
                found.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:  # another process makes room, too
                continue
        total = sum(size for _, size, _ in found)
        for used, size, path in sorted(found):
            if total <= self.limit:
                break
            if path != kept and time.time() - used > _IN_USE:
                path.unlink(missing_ok=True)
                total -= size
                log.debug("%s was removed from the cache", path)

    def _tried(self, name: str, action: Callable[[], T]) -> T:
        """The result of `action`, which is tried again after errors that may pass.

        Raises:
            FileNotFoundError: the store has no such file.
            StoreError: it gives no access, or all tries failed.
        """
        where = f"{self.url}/{name}"
        for number in range(1, self.config.tries + 1):
            try:
                return action()
            except FileNotFoundError:
                raise
            except _errors() as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # of the cache
                    raise
                _check_access(error, where)
                if number == self.config.tries:
                    raise StoreError(f"the store did not answer in {number} tries: {_said(error)}", where,
                                     "Check the network and the store; the same command resumes") from None  # fmt: skip
                seconds = min(self.config.wait * 2 ** (number - 1), _LONGEST_WAIT) * random.uniform(0.75, 1.25)
                log.warning("%s: %s; trying again in %.1f s", where, _said(error), seconds)
                time.sleep(seconds)
        raise AssertionError("tries is positive")

    # ---- names

    def has_folder(self, name: str) -> bool:
        """Whether there is a folder of this name. HTTP servers have none."""
        if self.protocol in ("http", "https"):
            return False
        return bool(self._tried(name, lambda: self._open()[0].isdir(self._path(name))))

    def within(self, name: str) -> Store:
        """The store of a folder in this one."""
        return Store(f"{self.url}/{name}", self.config)

    def glob(self, pattern: str) -> list[str]:
        """The names of files that match a pattern, relative to this folder.

        Raises:
            DataError: servers of HTTP do not list their files.
        """
        if self.protocol in ("http", "https"):
            raise DataError(f"'{pattern}' needs a list of files, which servers of HTTP do not give", self.url,
                            "Write the numbers of the shards: {0..99}")  # fmt: skip
        root = self._open()[1].rstrip("/")
        found = self._tried(pattern, lambda: self._open()[0].glob(f"{root}/{pattern}"))
        return sorted(str(path).removeprefix(f"{root}/") for path in found)

    def piece(self, name: str, offset: int = 0, length: int | None = None) -> StoredSlice:
        """A part of a file, or all of it, that is fetched when it is read.

        Raises:
            InputError: there is no such file.
        """
        if length is None:
            path = self.fetch(name)
            if path is None:
                raise InputError(
                    f"the file '{name}' does not exist", fix=f"Paths are relative to {self.url}", kind="missing"
                )
            length = path.stat().st_size
        return StoredSlice(Path(name), offset, length, self)


@dataclass(frozen=True)
class StoredSlice(FileSlice):
    """A part of a file of a store.

    Attributes:
        store: the folder that the path is relative to.
    """

    store: Store

    def read(self) -> bytes:
        """Its bytes, see `FileSlice.read`."""
        path = self.store.fetch(str(self.path))
        if path is None:
            raise FileNotFoundError(str(self))
        return FileSlice(path, self.offset, self.length).read()

    def __str__(self) -> str:
        return f"{self.store}/{self.path}" + (f"@{self.offset}" if self.offset else "")


@dataclass(frozen=True, kw_only=True)
class StoredFolder(Folder):
    """The folder of a store that the images of documents lie in.

    Attributes:
        store: the folder.
    """

    store: Store

    def image(self, text: Any, where: str) -> Any:
        """The file that `text` names, or the image of a data URL; see `Folder.image`."""
        if isinstance(text, str) and text.startswith("data:"):
            return super().image(text, where)
        text = check_type(text, str, where, "Give the path of an image, or null for a slot to fill")
        return find_stored(self.store, text, where)


def find_stored(store: Store, name: Any, where: str = "") -> StoredSlice:
    """The file that a record names, which must stay in the folder of the store. Records cannot name other URLs.

    Raises:
        InputError: it is no name, a URL, leads out of the folder, or does not exist.
    """
    root = Path(store.url)  # only to check the name
    path = resolve_inside(root, name, where)
    try:
        return store.piece(path.relative_to(root).as_posix())
    except InputError as error:
        raise (error if error.where or not where else error.at(where)) from None


# ---- errors of file systems


def _errors() -> tuple[type[BaseException], ...]:
    """The types of errors of the file systems that are loaded."""
    names = {"aiohttp": "ClientError", "botocore.exceptions": "BotoCoreError", "gcsfs.retry": "HttpError",
             "google.auth.exceptions": "GoogleAuthError"}  # fmt: skip
    found = [getattr(importlib.import_module(module), name) for module, name in names.items() if module in sys.modules]
    return (OSError, TimeoutError, *found)


def _check_access(error: BaseException, where: str) -> None:
    """Raise a `StoreError` for what another try does not mend."""
    status = getattr(error, "status", None)
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in _DENIED:
        raise StoreError(f"no access: {_said(error)}", where, "Give credentials as the store's tools take them (for S3 "
                         "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile), or store.options={anon: true} "
                         "for public files") from None  # fmt: skip
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        raise StoreError(f"the server refuses it: {_said(error)}", where, "Check the URL") from None


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process is in such a block; without effect on a file system without locks."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            log.debug("%s cannot be locked (%s)", path, error)
        yield
    finally:
        os.close(lock)
