"""A process among others, for tests: `peer_program CASE`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from mm_interleaved.launch import hub, peers

rank = int(os.environ["RANK"])


def stuck() -> None:
    """All but the last wait for something that does not come."""
    if dist.get_world_size() - 1 == rank:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def first_is_killed() -> None:
    if rank == 0:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def with_workers() -> None:
    """The process that is killed has a child, which lives on and had its connections when it was forked."""
    if rank == 1:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(6,))
        child.start()
        print("child", child.pid, flush=True)
    stuck()


def error() -> None:
    peers.note("step 7")
    if rank == 1:
        raise ValueError("no such thing")
    time.sleep(60)


def first_has_error() -> None:
    if rank == 0:
        raise ValueError("no such thing")
    time.sleep(60)


def collective() -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with peers.explained():
        dist.all_reduce(torch.zeros(1))


def late_collective() -> None:
    peers.note(f"step {7 - rank}")
    if rank == 1:
        hang()
    with peers.explained():
        dist.all_reduce(torch.zeros(1))


def hang() -> None:
    time.sleep(60)


def late() -> None:
    peers.note("step 3")
    for number in range(3):  # the same name may come again
        peers.meet("saving", 10)
        assert number < 3
    if rank == 1:
        hang()
    peers.meet("the end", 1.0)


def well() -> None:
    """One ends long before the other."""
    peers.meet("the end", 10)
    peers.disconnect()
    time.sleep(1.0 * (int(sys.argv[2]) == rank))


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (stuck, first_is_killed, with_workers, error, first_has_error, collective, late_collective, late, well)
}  # fmt: skip

if __name__ == "__main__":
    peers.QUIET_SECONDS, peers.GRACE_SECONDS, hub.ANSWER_SECONDS = 0.2, 0.5, 1.0
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))
    peers.connect()
    try:
        try:
            CASES[sys.argv[1]]()
        finally:
            peers.disconnect(sys.exception())
    except peers.PeerError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.status)
