"""A run that loses a process ends soon, says why, and goes on exactly."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from mm_interleaved.launch.exits import PEER_FAILED

from .kills import train_and_kill, train_whole


@pytest.mark.slow
def test_a_killed_process_changes_nothing_in_the_end(tmp_path: Path) -> None:
    train_whole(tmp_path / "whole")
    kill = train_and_kill(tmp_path / "run", tmp_path / "whole", Random(3))
    assert kill.status == PEER_FAILED
    assert kill.seconds < 60
    assert f"process {kill.rank} " in kill.reason
    assert kill.equal
