"""Files and folders appear whole or not at all, and say why they cannot be written."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import pytest

from mm_interleaved.io import (
    InputError,
    OutputError,
    append,
    atomic_folder,
    lock_folder,
    lock_fresh_folder,
    read_json,
    read_json_lines,
    write_atomic,
    write_json,
    write_json_lines,
    writing,
)


def full(path: Path, data: bytes) -> int:
    """As `Path.write_bytes` on a disk where half of it finds room."""
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": "é"})
    assert path.read_bytes() == '{\n  "a": "é"\n}\n'.encode()
    assert read_json(path) == {"a": "é"}
    write_json_lines(path, [{"a": 1}, {"b": 2}])
    assert [record for _, record in read_json_lines(path)] == [{"a": 1}, {"b": 2}]
    assert os.listdir(path.parent) == ["a.json"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "before")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        OutputError, match=rf"a\.txt: no space left in {tmp_path}\. Free some space; the same command resumes"
    ):
        write_atomic(path, "afterwards")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.txt"]


def raise_while_writing(path: Path, error: Exception) -> None:
    with writing(path):
        raise error


def test_a_full_disk_under_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch says nothing of the disk in its error, safetensors does not raise an OSError."""
    with pytest.raises(OutputError, match="no space left"):
        raise_while_writing(tmp_path / "a", ValueError("I/O error: No space left on device (os error 28)"))
    with pytest.raises(RuntimeError, match="unexpected pos"):  # with room on the disk it is another problem
        raise_while_writing(tmp_path / "a", RuntimeError("unexpected pos 64 vs 0"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "total free")(1 << 20, 0))
    with pytest.raises(OutputError, match="no space left"):
        raise_while_writing(tmp_path / "a", RuntimeError("unexpected pos 64 vs 0"))


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path, reason in (
        (tmp_path / "file" / "a.txt", "'.*file' is a file"),
        (tmp_path / "folder", "Is a directory"),
        (tmp_path / ("a" * 300) / "b", "File name too long"),
        (Path("/proc/none/a.txt"), "No such file"),
    ):
        with pytest.raises(OutputError, match=f"cannot be written: ({reason})"):
            write_atomic(path, "text")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_long_names_can_be_written(tmp_path: Path) -> None:
    write_atomic(tmp_path / ("a" * 255), "text")
    assert os.listdir(tmp_path) == ["a" * 255]


def test_text_that_no_file_can_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(InputError, match=r"a\.json: lone surrogate"):
        write_json(tmp_path / "a.json", {"name": "\udce9"})
    with pytest.raises(InputError, match="lone surrogate"):
        append(tmp_path / "a.json", "\ud83d")
    assert read_json(tmp_path / "a.json") == 1


def test_lines_are_added_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    append(path, "one\n")
    append(path, "two\n")

    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OutputError, match="no space left"):
        append(path, "three\n")
    assert path.read_text() == "one\ntwo\n"


def fill(target: Path, error: Exception) -> None:
    """Begin a folder, and fail."""
    with atomic_folder(target, replace=True) as folder:
        (folder / "b").touch()
        raise error


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with atomic_folder(target) as folder:
        (folder / "a").touch()
        assert not target.exists()
    assert os.listdir(target) == ["a"]
    with pytest.raises(OutputError, match=r"exists already\. Name a new folder"), atomic_folder(target):
        pass
    with pytest.raises(ZeroDivisionError):
        fill(target, ZeroDivisionError())
    assert os.listdir(target) == ["a"]
    with atomic_folder(target, replace=True) as folder:
        (folder / "c").touch()
    assert os.listdir(target) == ["c"]
    assert os.listdir(tmp_path / "deep") == ["target"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "target") as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "target.incomplete").mkdir()
    (tmp_path / "target.incomplete" / "half").touch()
    with atomic_folder(tmp_path / "target") as folder:
        (folder / "whole").touch()
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["whole"]
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_a_folder_on_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no space left"):
        fill(tmp_path / "target", OSError(errno.ENOSPC, "No space left on device"))
    assert not os.listdir(tmp_path)


def hold(folder: Path, held: multiprocessing.synchronize.Event, end: multiprocessing.synchronize.Event) -> None:
    with lock_folder(folder):
        held.set()
        end.wait(60)


def test_one_process_holds_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", held, end))
    process.start()
    try:
        assert held.wait(60)
        with (
            pytest.raises(OutputError, match=rf"run: in use by process {process.pid} on .*Wait"),
            lock_folder(tmp_path / "run"),
        ):
            pass
    finally:
        process.kill()
        process.join()
    with lock_folder(tmp_path / "run"):  # a killed process holds nothing
        pass
    assert not os.listdir(tmp_path / "run")


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    """Nothing of its own: files that were there stay, and so do all after it has begun, or after another error."""
    folder = tmp_path / "runs/own"

    def write(error: Exception, begun: bool = False) -> list[str]:
        with suppress(type(error)), lock_fresh_folder(folder, lambda: begun):
            (folder / "logs").mkdir()
            (folder / "logs/events").touch()
            (folder / "logs/link").symlink_to(tmp_path)
            raise error
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))

    assert write(InputError("a bad setting")) == []
    folder.mkdir(parents=True)
    (folder / "old").touch()
    assert write(InputError("a bad setting")) == ["runs", "runs/own", "runs/own/old"]
    assert "runs/own/logs/events" in write(RuntimeError("out of memory"))
    shutil.rmtree(folder)
    assert "runs/own/logs/events" in write(InputError("bad data after some steps"), begun=True)
