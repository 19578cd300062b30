"""Output folders: full disks, places that cannot be written, two processes at once, names that are not UTF-8."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mm_interleaved.io import lock_folder

from .conftest import EXAMPLES
from .test_generate import QUICK, Mmi, files, story, write

ROOT = EXAMPLES.parent
TRAIN = ("train", ROOT / "configs/debug.yaml", "--device", "cpu")
UNWRITABLE = {
    "a file": lambda folder: write(folder, [], "file"),
    "in a file": lambda folder: write(folder, [], "file") / "out",
    "a long name": lambda folder: folder / ("a" * 300),
    "no such place": lambda folder: Path("/proc/none/out"),
}


@pytest.mark.parametrize("place", UNWRITABLE.values(), ids=UNWRITABLE)
@pytest.mark.parametrize("command", ["generate", "train", "sheet"])
def test_places_that_cannot_be_written(mmi: Mmi, tmp_path: Path, command: str, place, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    out = place(tmp_path)
    if command == "generate":
        done = mmi("generate", write(tmp_path, story(1)), "-o", out, *QUICK)
    elif command == "train":
        done = mmi(*TRAIN, f"output={out}")
    else:
        done = mmi("toyworld", "show", "--out", out / "sheet.png", "-n", 1)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert str(out) in done.err.replace(" ", "") or "does not exist" in done.err
    assert "Traceback" not in done.err


def test_a_full_disk(mmi: Mmi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        done = mmi("generate", write(tmp_path, story(1)), "-o", tmp_path / "out", *QUICK)
    assert done.code == 1
    assert "no space left in" in done.err
    assert "the same command resumes" in done.err
    assert files(tmp_path / "out") == set()
    assert mmi("generate", tmp_path / "input.json", "-o", tmp_path / "out", *QUICK).code == 0


@pytest.mark.parametrize("command", ["generate", "train"])
def test_a_folder_that_another_process_holds(mmi: Mmi, tmp_path: Path, command: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    with lock_folder(out):
        done = mmi(*TRAIN, f"output={out}") if command == "train" else mmi(
            "generate", write(tmp_path, story(1)), "-o", out, *QUICK)  # fmt: skip
        assert files(out) == {".lock"}
    assert done.code == 1
    assert f"in use by process {os.getpid()} on" in done.err


def test_names_that_are_not_utf8_are_refused_before_work_begins(mmi: Mmi, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    for arguments in (("generate", write(tmp_path, story(1)), "-o", folder / "out", *QUICK),
                      (*TRAIN, f"output={folder}/run"), ("evaluate", "x.yaml", f"output={folder}")):  # fmt: skip
        done = mmi(*arguments)
        assert done.code == 1
        assert "caf\ufffd" in done.err
        assert "is not UTF-8; rename it" in done.err
    assert not list(folder.iterdir())


def test_work_in_a_folder_whose_name_is_not_utf8_is_refused(
    mmi: Mmi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert "is not UTF-8" in mmi("info").err
