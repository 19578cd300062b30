"""Output folders: full disks, places that cannot be written, two processes at once, names that are not UTF-8."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from mm_interleaved import MMInterleaved, MMInterleavedConfig
from mm_interleaved.io import lock_folder
from mm_interleaved.pretrained import TOKENIZER
from toyworld.writers import write_dataset
from toyworld.writers.base import Job

from .conftest import EXAMPLES, spawn
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


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Callable[[int], None]]:
    """A file system of its own in a folder; yields what changes its size."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")

    def resize(kib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kib}k", folder], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", folder], check=True)  # later, if weights in it are still mapped


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of an evaluation of a debug model: short answers and images."""
    folder = tmp_path_factory.mktemp("evaluation")
    for form in ("vqav2", "coco"):
        write_dataset(form, folder / form, Job(6, "val", 0, 48))
    quick = {"num_inference_steps": 1, "num_candidates": 1, "max_new_tokens": 3, "min_new_tokens": 1, "num_beams": 1}
    tasks = [{"task": name, "annotations": str(folder / name), "images": str(folder / name), "generation": quick}
             for name in ("vqav2", "coco")]  # fmt: skip
    settings = {"output": "out", "model": "debug", "batch_size": 2, "gallery": 4, "tasks": tasks}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    return folder / "settings.yaml"


def results(folder: Path) -> dict[str, str]:
    """What an evaluation found, without how long it took."""
    found = {name: (folder / name).read_text() for name in files(folder) if name.endswith("predictions.jsonl")}
    return found | {"values": json.dumps(json.loads((folder / "results.json").read_text())["tasks"], sort_keys=True)}


@pytest.mark.slow
@pytest.mark.parametrize("kib", [4, 20, 48])
def test_a_full_disk_while_evaluating(mmi: Mmi, tmp_path: Path, evaluation: Path, kib: int) -> None:
    command = ("evaluate", evaluation, "--device", "cpu")
    assert mmi(*command, f"output={tmp_path / 'whole'}").code == 0
    with small_disk(tmp_path / "disk", kib) as resize:
        out = tmp_path / "disk/out"
        done = mmi(*command, f"output={out}")
        assert done.code == 1
        assert "no space left in" in done.err
        assert "the same command resumes" in done.err
        assert "Traceback" not in done.err
        assert not [name for name in files(out) if Path(name).name.startswith(".")]  # neither a lock nor half a file
        resize(8192)
        assert mmi(*command, f"output={out}").code == 0
        assert results(out) == results(tmp_path / "whole")


def test_a_full_disk_while_converting(mmi: Mmi, tmp_path: Path) -> None:
    """In both directions: nothing half-written stays, and the same command goes on when there is space."""
    torch.manual_seed(0)
    config = MMInterleavedConfig.preset("debug")
    MMInterleaved(config).save_pretrained(tmp_path / "ours")
    there = ("convert", tmp_path / "ours", tmp_path / "disk/there", "--to-original")
    back = ("convert", tmp_path / "disk/there", tmp_path / "disk/back", "--config", "debug", "--tokenizer", TOKENIZER)
    disk = tmp_path / "disk"
    with small_disk(disk, 100) as resize:
        for command, there_before in ((there, set()), (back, {"there"})):
            used = shutil.disk_usage(disk).used // 1024
            resize(used + 100)
            done = mmi(*command)
            assert done.code == 1
            assert "no space left in" in done.err
            assert "Traceback" not in done.err
            assert {path.name for path in disk.iterdir()} == there_before
            resize(used + 65536)
            assert mmi(*command).code == 0
        again = MMInterleaved.from_pretrained(tmp_path / "disk/back").state_dict()
    first = MMInterleaved.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_two_evaluations_at_once_in_one_folder(mmi: Mmi, tmp_path: Path, evaluation: Path) -> None:
    command = ("evaluate", evaluation, "--device", "cpu", f"output={tmp_path / 'out'}")
    first = spawn(*command)
    lock = tmp_path / "out/.lock"
    while first.poll() is None and not (lock.is_file() and lock.read_text()):
        time.sleep(0.01)
    assert first.poll() is None, first.communicate()
    second = mmi(*command)
    assert second.code == 1
    assert f"in use by process {first.pid} on" in second.err
    output, problems = first.communicate(timeout=60)
    assert first.returncode == 0, problems
    assert "results.json" in output
    assert not lock.exists()


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
