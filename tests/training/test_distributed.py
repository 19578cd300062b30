"""Several processes do what one does with more accumulation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import ROOT, arguments, logged
from .stand_in import COLORS

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run_stand_in(run: Path, *changes: str, processes: int = 1) -> None:
    launch = LAUNCH if processes > 1 else [sys.executable]
    launch = [*launch, "-m", "tests.training.stand_in"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*launch, *arguments(run, "log_every=1", "save_every=0", *changes)],
        cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_learn_like_one_that_accumulates(tmp_path: Path) -> None:
    run_stand_in(tmp_path / "one", "steps=4", "accumulation=2")
    run_stand_in(tmp_path / "two", "steps=4", processes=2)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert list(one) == list(two) == [1, 2, 3, 4]
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
    a, b = (load_file(tmp_path / run / "final/model.safetensors") for run in ("one", "two"))
    # Adam turns rounding into steps where gradients are nearly 0, so hardly any weight may differ, and by little.
    apart = [float((a[n] - b[n]).abs().max()) for n in a]
    assert max(apart) < 4 * 1e-3
    assert sum(x > 1e-4 for x in apart) < 0.2 * len(apart)
    assert len(COLORS) == 8


@pytest.mark.slow
def test_sharded_parameters_learn_the_same(tmp_path: Path) -> None:
    run_stand_in(tmp_path / "ddp", "steps=3", processes=2)
    run_stand_in(tmp_path / "fsdp", "steps=3", "fsdp={fsdp_version: 2}", processes=2)
    ddp, fsdp = logged(tmp_path / "ddp"), logged(tmp_path / "fsdp")
    assert list(fsdp.values()) == pytest.approx(list(ddp.values()), rel=1e-3)
    assert torch.isfinite(load_file(tmp_path / "fsdp/final/model.safetensors")["context_proj.weight"]).all()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed")
def test_deepspeed_learns_the_same_and_goes_on(tmp_path: Path) -> None:
    settings = ["schedule.kind=constant", f"deepspeed={ROOT / 'configs/deepspeed/zero1.json'}"]
    run_stand_in(tmp_path / "ddp", "steps=4", "schedule.kind=constant", processes=2)
    run_stand_in(tmp_path / "whole", "steps=4", "save_every=2", *settings, processes=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped", ignore=shutil.ignore_patterns("checkpoint-4", "final"))
    run_stand_in(tmp_path / "stopped", "steps=4", "save_every=2", *settings, processes=2)
    assert list(logged(tmp_path / "whole").values()) == pytest.approx(list(logged(tmp_path / "ddp").values()), rel=1e-4)
    ddp, whole, stopped = (load_file(tmp_path / run / "final/model.safetensors") for run in ("ddp", "whole", "stopped"))
    for name, weight in whole.items():
        assert torch.equal(weight, stopped[name]), name
        torch.testing.assert_close(weight, ddp[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_recorded_steps_are_averaged_over_processes() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [*LAUNCH, "-m", "tests.training.averages"]
    done = subprocess.run(launch, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
