"""Runs of two processes that lose one, their disk or their newest checkpoint, and go on exactly."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from random import Random

import pytest

from mm_interleaved.launch.exits import PEER_FAILED
from mm_interleaved.training.checkpoints import find_damage, list_checkpoints

from ..cli.test_output_folders import small_disk
from ..programs import start_together
from ..training.conftest import arguments
from .kills import is_same, start_run, train_and_kill, train_whole, wait_for


@pytest.mark.slow
def test_a_killed_process_changes_nothing_in_the_end(whole: Path, tmp_path: Path) -> None:
    kill = train_and_kill(tmp_path / "run", whole, Random(3))
    assert kill.status == PEER_FAILED
    assert kill.seconds < 60
    assert f"process {kill.rank} " in kill.reason
    assert kill.equal


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(whole: Path, tmp_path: Path) -> None:
    """A process cannot write, and the other one learns why instead of waiting for it."""
    with small_disk(tmp_path / "disk", 1 << 18) as resize:
        run = tmp_path / "disk/run"
        programs = start_run(run)
        wait_for(lambda: bool(list_checkpoints(run)), programs)
        resize(shutil.disk_usage(tmp_path / "disk").used // 1024 + 500)
        said = [" ".join("".join(program.communicate()).split()) for program in programs]
        statuses = [program.returncode for program in programs]
        assert 1 in statuses, said
        assert set(statuses) <= {1, PEER_FAILED}, said
        assert all("no space left in" in text for text in said)
        assert "the same command resumes" in said[statuses.index(1)]
        kept = list_checkpoints(run)
        assert [checkpoint.name for checkpoint in kept] == ["checkpoint-3"]
        assert find_damage(kept[0]) == ""
        assert not list(run.glob("*.incomplete"))
        resize(1 << 18)
        train_whole(run)
        assert is_same(run, whole)


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True, ignore=shutil.ignore_patterns("checkpoint-9", "checkpoint-10", "final"))
    path = run / "checkpoint-6/optimizer.pt"
    path.write_bytes(path.read_bytes()[:-100])
    first, _ = train_whole(run)
    assert "checkpoint-6' is damaged: optimizer.pt" in " ".join(first.split())
    assert f"going on from {run / 'checkpoint-3'}" in " ".join(first.split())
    assert is_same(run, whole)


@pytest.mark.slow
def test_what_the_first_process_refuses_ends_the_others(whole: Path) -> None:
    """It alone looks at the folder of the run, and the others wait for what it finds."""
    programs = start_run(whole, "resume=never")
    said = [" ".join("".join(program.communicate()).split()) for program in programs]
    assert [program.returncode for program in programs] == [1, PEER_FAILED]
    assert all("has checkpoints already; choose another 'output'" in text for text in said)


@pytest.mark.slow
def test_a_process_that_hangs_is_named_with_what_it_does(tmp_path: Path) -> None:
    """The other one waits in its backward pass until the time of the operation is over."""
    settings = arguments(tmp_path / "run", "log_every=1", "save_every=0", "trainer.ddp_timeout=15")
    begin = time.monotonic()
    programs = start_together(2, "tests.training.stand_in", "--hang", *settings, OMP_NUM_THREADS="1")
    said = [" ".join("".join(program.communicate()).split()) for program in programs]
    assert time.monotonic() - begin < 60
    assert [program.returncode for program in programs] == [1, PEER_FAILED], said
    assert re.search(r"process 0 \(.*\), last at step 2, waited in vain for others in ", said[0])
    hangs = r"1 of 2 processes did not wait: process 1 \(\d+ on \S+\), last at step 2, in \w+ \(.*\.py:\d+\) of "
    assert all(re.search(hangs, text) for text in said), said
