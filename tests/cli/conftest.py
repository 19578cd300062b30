"""Running `mmi` in this process and outside of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mm_interleaved.cli import main

from ..programs import Program

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass
class Outcome:
    """What a command left: exit status, results and messages, each with its white space made plain."""

    code: int
    out: str
    err: str


@pytest.fixture
def mmi(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call `mmi` in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Outcome(stopped.value.code or 0, " ".join(captured.out.split()), " ".join(captured.err.split()))

    return call


def spawn(*arguments: object) -> Program:
    """Start `mmi` as a process of its own."""
    return Program("mm_interleaved.cli", *arguments)
