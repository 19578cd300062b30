"""A debug run on small documents, and how to start one in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mm_interleaved.configuration import load_config
from mm_interleaved.pretrained import load
from mm_interleaved.training.config import TrainConfig

from ..programs import Program

ROOT = Path(__file__).parents[2]
QUICK = ["tensorboard=false", "eval_every=0", "sample_every=0", f"data.sources.0.root={ROOT / 'examples'}"]


def whole_model(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Writes a debug model with weights of its own; these, and settings of one step from it that changes nothing."""
    whole = load("debug")
    with torch.no_grad():
        for parameter in whole.model.parameters():
            parameter.add_(0.01)
    whole.model.save_pretrained(folder)
    whole.processor.save_pretrained(folder)
    return whole.model.state_dict(), [
        "model.init_from.preset=null", f"model.init_from.checkpoint={folder}", "optimizer.lr=1e-9", "steps=1"
    ]  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path):
    """Settings of a debug run in a folder of its own; further ones as `key=value`."""

    def make(*changes: str, run: str = "run") -> TrainConfig:
        return load_config(ROOT / "configs/debug.yaml", TrainConfig, arguments(tmp_path / run, *changes))

    return make


def arguments(run: Path, *changes: str) -> list[str]:
    return [f"output={run}", *QUICK, "eval_data=null", *changes]


def start(run: Path, *changes: str) -> Program:
    """`mmi train` on the CPU in a process of its own."""
    return Program("mm_interleaved.cli", *command(run, *changes), merge=True)


def start_new(run: Path, *changes: str) -> subprocess.Popen[str]:
    """The same as a user starts it, by a new interpreter; its output can be read while it runs."""
    return subprocess.Popen(
        [sys.executable, "-m", "mm_interleaved.cli", *command(run, *changes)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def command(run: Path, *changes: str) -> list[str]:
    return ["train", "--device", "cpu", str(ROOT / "configs/debug.yaml"), *arguments(run, *changes)]


def logged(run: Path, key: str = "loss") -> dict[int, float]:
    """Step to value."""
    entries: list[dict[str, Any]] = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {e["step"]: e[key] for e in entries if key in e}


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in float32 depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
