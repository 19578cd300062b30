"""One, two and three processes do the same, and so does a run that was killed and taken up again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import MakeTask, contents, figures, lines
from .worker import finish, start


@pytest.mark.slow
def test_any_number_of_processes_does_the_same(
    task: MakeTask, settings_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Words, images with true images of their own, and candidate answers."""
    tasks = [task("vqav2", limit=11), task("flintstones", limit=3), task("visdial", limit=3)]
    config = settings_file(*tasks, batch_size=2, gallery=0)
    for number in (1, 2, 3):
        finish(config, start(config, f"output={tmp_path}/p{number}", processes=number))
    one = contents(tmp_path / "p1")
    assert len(one) > 6
    assert len({r["text"] for r in lines(tmp_path / "p1/vqav2/predictions.jsonl")}) > 1
    for other in ("p2", "p3"):
        assert contents(tmp_path / other) == one
        assert figures(tmp_path / other) == figures(tmp_path / "p1")
        assert not list((tmp_path / other).glob("*/part-*"))
    assert json.loads((tmp_path / "p3/results.json").read_text())["machine"]["processes"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("again", [1, 2])
def test_a_killed_run_goes_on(again: int, task: MakeTask, settings_file: Callable[..., Path], tmp_path: Path) -> None:
    """Without doing anything twice, even with another number of processes; a half-written line is no harm."""
    asked = task("coco", limit=4, generation={"num_inference_steps": 20, "num_candidates": 1})
    config = settings_file(asked, batch_size=1, gallery=0)
    finish(config, start(config, f"output={tmp_path}/whole"))
    (process,) = start(config, f"output={tmp_path}/killed")
    part = tmp_path / "killed/coco/part-0.jsonl"
    while process.is_alive() and not (part.exists() and len(part.read_bytes().splitlines()) >= 2):
        time.sleep(0.005)
    process.kill()  # SIGKILL
    process.join()
    done = lines(part)
    assert 2 <= len(done) < 4
    with part.open("a") as file:
        file.write('{"index": 3, "id"')
    made = {r["images"][0]: (tmp_path / "killed/coco" / r["images"][0]).stat().st_mtime_ns for r in done}
    finish(config, start(config, f"output={tmp_path}/killed", processes=again))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
    assert {name: (tmp_path / "killed/coco" / name).stat().st_mtime_ns for name in made} == made
    results = json.loads((tmp_path / "killed/results.json").read_text())
    assert results["speed"]["coco"]["samples"] == 4 - len(done)


@pytest.mark.slow
def test_under_torchrun_errors_are_told_once(
    task: MakeTask, settings_file: Callable[..., Path], tmp_path: Path
) -> None:
    config = settings_file(task("vqav2", annotations=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
               "mm_interleaved.cli", "evaluate", "--device", "cpu", str(config)]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True,
                          timeout=120, check=False)  # fmt: skip
    said = " ".join(done.stderr.split())
    assert done.returncode == 1
    assert said.count("error:") == 1
    assert "needs this file, which does not exist" in said
    assert "evaluate.py" not in said  # no trace of ours
