"""A run that is interrupted goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mm_interleaved.pretrained import TOKENIZER, load
from mm_interleaved.training.checkpoints import ASIDE, list_checkpoints
from mm_interleaved.training.run import train

from .conftest import logged, start, start_new


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_a_killed_run_continues_the_same_curve(settings, tmp_path: Path) -> None:
    whole = settings("log_every=1", "ema.decay=0.9", run="whole")
    assert train(whole, TOKENIZER, "cpu") is None
    process = start(tmp_path / "killed", "log_every=1", "ema.decay=0.9")
    while process.poll() is None and logged_step(tmp_path / "killed") < 12:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert [c.name for c in list_checkpoints(tmp_path / "killed")] == ["checkpoint-10"]
    train(settings("log_every=1", "ema.decay=0.9", run="killed"), TOKENIZER, "cpu")
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert len(logged(tmp_path / "killed")) == 20
    assert_same(tmp_path / "whole/checkpoint-20", tmp_path / "killed/checkpoint-20")
    assert_same(tmp_path / "whole/final", tmp_path / "killed/final")


def logged_step(run: Path) -> int:
    return len(logged(run)) if (run / "log.jsonl").is_file() else 0


def test_sigterm_saves_and_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, "log_every=1", "steps=500", "save_every=0")
    while process.poll() is None and logged_step(run) < 2:
        time.sleep(0.02)
    for _ in range(3):  # as `timeout` and batch systems do: to the process, and to its group
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "stopped by SIGTERM" in output
    (checkpoint,) = list_checkpoints(run)
    assert load(checkpoint).trained
    assert not (run / "final").exists()


@pytest.mark.slow
def test_a_second_wish_does_not_wait(tmp_path: Path) -> None:
    process = start_new(tmp_path / "run", "steps=2", "accumulation=1000", "save_every=0")  # a step of minutes
    assert any("trainable parameters" in line for line in process.stdout)
    time.sleep(2)  # it listens when it has begun
    process.send_signal(signal.SIGTERM)
    assert any("saving after this step" in line for line in process.stdout)
    time.sleep(2.1)  # sooner, it would be the same wish
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert not list_checkpoints(tmp_path / "run")


def test_a_half_written_checkpoint_is_not_used(settings, tmp_path: Path) -> None:
    train(settings("steps=4", "save_every=2"), TOKENIZER, "cpu")
    run = tmp_path / "run"
    (run / ASIDE / "checkpoint-8").mkdir(parents=True)
    (run / "checkpoint-6").mkdir()  # without its state
    assert [c.name for c in list_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    train(settings("steps=6", "save_every=2", "keep_checkpoints=1"), TOKENIZER, "cpu")
    assert [c.name for c in list_checkpoints(run)] == ["checkpoint-6"]
    assert not (run / ASIDE).exists()


def test_a_run_that_is_made_longer_hands_over_its_last_weights(settings, tmp_path: Path) -> None:
    longer, whole = (["save_every=2", "schedule.kind=constant", f"steps={steps}"] for steps in (2, 4))
    for changes, run in ((longer, "longer"), (whole, "longer"), (whole, "whole")):
        train(settings(*changes, run=run), TOKENIZER, "cpu")
    one, two = (load_file(tmp_path / run / "final/model.safetensors") for run in ("longer", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert not list((tmp_path / "longer").glob("final.*"))
    before = (tmp_path / "longer/final/model.safetensors").stat().st_mtime_ns
    train(settings(*whole, run="longer"), TOKENIZER, "cpu")  # there is nothing left to do
    assert (tmp_path / "longer/final/model.safetensors").stat().st_mtime_ns == before


def test_what_cannot_be_resumed_is_refused(settings, tmp_path: Path) -> None:
    train(settings("steps=2", "save_every=2"), TOKENIZER, "cpu")
    with pytest.raises(ValueError, match="has checkpoints already"):
        train(settings("resume=never"), TOKENIZER, "cpu")
    with pytest.raises(ValueError, match="is no checkpoint of a run"):
        train(settings(f"resume={tmp_path}"), TOKENIZER, "cpu")
