"""Runs of two processes of which one is killed; `scripts/kill_processes` makes many of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file

from ..programs import start_together
from ..training.conftest import command, logged

STEPS = 16
SETTINGS = [f"steps={STEPS}", "save_every=4", "log_every=1", "ema.decay=0.9"]


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


def train_whole(folder: Path) -> None:
    """The unbroken run of two processes."""
    for program in start_together(2, "mm_interleaved.cli", *command(folder, *SETTINGS), OMP_NUM_THREADS="1"):
        said = program.communicate()
        assert program.returncode == 0, said


def train_and_kill(folder: Path, whole: Path, random: Random) -> Kill:
    """Train, kill one of the processes at a random moment, start both again, and compare with the unbroken run."""
    kill = Kill(random.randrange(2), random.randrange(1, STEPS), random.random() * 0.5)
    programs = start_together(2, "mm_interleaved.cli", *command(folder, *SETTINGS), OMP_NUM_THREADS="1")
    deadline = time.monotonic() + 120
    while _last_step(folder) < kill.step:
        assert time.monotonic() < deadline, programs[0].said()
        time.sleep(0.01)
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
    kill.equal = logged(folder) == logged(whole) and _same(folder / "final", whole / "final")
    return kill


def _last_step(run: Path) -> int:
    return max(logged(run), default=0) if (run / "log.jsonl").is_file() else 0


def _same(a: Path, b: Path) -> bool:
    one, two = (load_file(folder / "model.safetensors") for folder in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
