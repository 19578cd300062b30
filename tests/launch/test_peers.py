"""Processes that end when another one does, and say which."""

from __future__ import annotations

import re
import signal

import psutil
import pytest

from mm_interleaved.launch.exits import PEER_FAILED

from ..programs import Program, start_together

KILLED = -signal.SIGKILL


def ended(*case: str, processes: int = 2) -> tuple[list[int | None], list[str]]:
    """The exit statuses of processes, and what they said."""
    started: list[Program] = start_together(processes, "tests.launch.peer_program", *case)
    said = [" ".join("".join(program.communicate(40)).split()) for program in started]
    return [program.returncode for program in started], said


def test_a_killed_process_ends_the_others() -> None:
    statuses, said = ended("stuck")
    assert statuses == [PEER_FAILED, KILLED]
    assert re.search(r"process 1 \(\d+ on \S+\) has ended without a message .*it was killed", said[0])
    assert "goes on from the last complete checkpoint" in said[0]


@pytest.mark.slow
def test_processes_that_it_had_forked_do_not_hide_its_end() -> None:
    first, second = start_together(2, "tests.launch.peer_program", "with_workers")
    first.communicate(40)
    assert first.returncode == PEER_FAILED
    assert psutil.pid_exists(int(re.search(r"child (\d+)", second.said())[1]))
    second.communicate(40)


def test_all_others_learn_of_it() -> None:
    statuses, said = ended("stuck", processes=4)
    assert statuses == [PEER_FAILED] * 3 + [KILLED]
    assert all("process 3 (" in text for text in said[:3])


def test_the_first_process_may_be_the_one() -> None:
    statuses, said = ended("first_is_killed")
    assert statuses == [KILLED, PEER_FAILED]
    assert "process 0 has ended" in said[1]


def test_others_learn_why() -> None:
    statuses, said = ended("error")
    assert statuses == [PEER_FAILED, 1]
    assert re.search(r"process 1 \(.*\) failed at step 7: ValueError: no such thing", said[0])
    statuses, said = ended("first_has_error")
    assert statuses == [1, PEER_FAILED]
    assert re.search(r"process 0 \(.*\) failed at its start: ValueError: no such thing", said[1])


def test_a_collective_operation_says_who_is_missing() -> None:
    statuses, said = ended("collective")
    assert statuses == [PEER_FAILED, KILLED]
    assert re.search(r"process 1 \(.*\) has ended without a message", said[0])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_an_operation_that_times_out_says_who_hangs_and_where(processes: int) -> None:
    """All others wait in the same operation; each names it, the step, and the function in which the process hangs."""
    statuses, said = ended("late_collective", processes=processes)
    assert statuses == [PEER_FAILED] * processes
    hangs = (
        rf"1 of {processes} processes did not wait: process 1 \(\d+ on \S+\), last at step 6, in hang \(peer_program"
    )
    for rank in {*range(processes)} - {1}:
        waits = (
            rf"process {rank} \(.*\), last at step {7 - rank}, waited in vain for others in all_reduce \(.*Timed out"
        )
        assert re.search(waits, said[rank])
        assert re.search(hangs, said[rank])
    assert re.search(hangs, said[1])


def test_a_barrier_names_the_late() -> None:
    statuses, said = ended("late")
    assert statuses == [PEER_FAILED, PEER_FAILED]
    words = (
        r"'the end': 1 of 2 processes did not arrive within 1 s: process 1 \(.*\), last at 'saving', in hang \(peer_pro"
    )
    assert all(re.search(words, text) for text in said)


@pytest.mark.parametrize("last", [0, 1])
def test_processes_that_end_well_do_not_disturb_others(last: int) -> None:
    statuses, said = ended("well", str(last))
    assert statuses == [0, 0], said
    assert not any("process" in text for text in said)
