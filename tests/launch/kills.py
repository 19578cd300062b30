"""Runs of two processes of which one is killed; `scripts/kill_processes` makes many of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file

from ..programs import Program, start_together
from ..training.conftest import command, logged

STEPS = 10
SETTINGS = [f"steps={STEPS}", "save_every=3", "log_every=1", "keep_checkpoints=4", "ema.decay=0.9"]


@dataclass
class Kill:
    """What happened to a run.

    Attributes:
        rank, step, later: which process was killed, after which step, and how many seconds after its line in the log.
        resumed: the step of the checkpoint that the run went on from; 0: it began anew.
        seconds: from the kill to the end of the other process.
        status: its exit status.
        reason: the last line that it said.
        equal: whether the run ended with the losses and parameters of the unbroken one.
    """

    rank: int
    step: int
    later: float
    resumed: int = 0
    seconds: float = 0.0
    status: int | None = None
    reason: str = ""
    equal: bool = False


def start_run(folder: Path, *changes: str) -> list[Program]:
    """Start a run of two processes."""
    return start_together(2, "mm_interleaved.cli", *command(folder, *SETTINGS, *changes), OMP_NUM_THREADS="1")


def train_whole(folder: Path, *changes: str) -> list[str]:
    """Train to the end; what the two processes said."""
    programs = start_run(folder, *changes)
    said = ["".join(program.communicate()) for program in programs]
    assert [program.returncode for program in programs] == [0, 0], "\n".join(said)
    return said


def train_and_kill(folder: Path, whole: Path, random: Random) -> Kill:
    """Train, kill one of the processes at a random moment, start both again, and compare with the unbroken run."""
    kill = Kill(random.randrange(2), random.randrange(1, STEPS), random.random() * 0.5)
    programs = start_run(folder)
    wait_for(lambda: last_step(folder) >= kill.step, programs)
    time.sleep(kill.later)
    programs[kill.rank].kill()
    begin = time.monotonic()
    other = programs[1 - kill.rank]
    said = "".join(other.communicate(90))
    kill.seconds, kill.status = time.monotonic() - begin, other.returncode
    kill.reason = next((line for line in reversed(said.splitlines()) if "process" in line), "")
    programs[kill.rank].communicate(90)
    kept = [int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")]
    kill.resumed = max((n for n in kept if (folder / f"checkpoint-{n}/trainer_state.json").is_file()), default=0)
    train_whole(folder)
    kill.equal = is_same(folder, whole)
    return kill


def wait_for(true: Callable[[], bool], programs: Sequence[Program], seconds: float = 120) -> None:
    """Wait until something is true, and fail when it takes too long."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "\n".join(program.said() for program in programs)
        time.sleep(0.01)


def last_step(run: Path) -> int:
    """The last step in the log of a run; 0: there is none."""
    return max(logged(run), default=0) if (run / "log.jsonl").is_file() else 0


def is_same(run: Path, whole: Path) -> bool:
    """Whether two runs have the same losses and ended with the same parameters."""
    one, two = (load_file(folder / "final/model.safetensors") for folder in (run, whole))
    same = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    return same and logged(run) == logged(whole)
