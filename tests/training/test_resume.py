"""A run that is interrupted goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mm_interleaved.configuration import load_config
from mm_interleaved.launch.exits import STOPPED
from mm_interleaved.pretrained import TOKENIZER, load
from mm_interleaved.training.checkpoints import ASIDE, MANIFEST, find_damage, find_resume, list_checkpoints
from mm_interleaved.training.config import TrainConfig, TrainingError
from mm_interleaved.training.run import train

from .conftest import ROOT, arguments, logged, start, start_new


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.slow
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
    assert process.returncode == STOPPED, output
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


@pytest.mark.slow
def test_a_half_written_checkpoint_is_not_used(settings, tmp_path: Path) -> None:
    train(settings("steps=4", "save_every=2"), TOKENIZER, "cpu")
    run = tmp_path / "run"
    (run / ASIDE / "checkpoint-8").mkdir(parents=True)
    (run / "checkpoint-6").mkdir()  # without its state
    assert [c.name for c in list_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    train(settings("steps=6", "save_every=2", "keep_checkpoints=1"), TOKENIZER, "cpu")
    assert [c.name for c in list_checkpoints(run)] == ["checkpoint-6"]
    assert not (run / ASIDE).exists()


@pytest.mark.slow
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


def test_a_run_at_its_end_trains_no_further(settings, tmp_path: Path) -> None:
    """Killed between the last checkpoint and `final`, and then given again twice."""
    train(settings("steps=4", "save_every=2", "ema.decay=0.5"), TOKENIZER, "cpu")
    run = tmp_path / "run"
    whole = weights(run / "final")
    shutil.rmtree(run / "final")
    for _ in range(2):
        train(settings("steps=4", "save_every=2", "ema.decay=0.5"), TOKENIZER, "cpu")
        assert [c.name for c in list_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
        assert all(torch.equal(whole[name], tensor) for name, tensor in weights(run / "final").items())


@pytest.mark.slow
def test_final_of_a_shorter_run_is_replaced(settings, tmp_path: Path) -> None:
    """The run is made longer and killed before it writes `final` anew."""
    train(settings("steps=2", "save_every=2", "schedule.kind=constant"), TOKENIZER, "cpu")
    run = tmp_path / "run"
    shutil.copytree(run / "final", tmp_path / "short")
    train(settings("steps=4", "save_every=2", "schedule.kind=constant"), TOKENIZER, "cpu")
    longer = weights(run / "final")
    shutil.rmtree(run / "final")
    (tmp_path / "short").rename(run / "final")
    train(settings("steps=4", "save_every=2", "schedule.kind=constant"), TOKENIZER, "cpu")
    assert all(torch.equal(longer[name], tensor) for name, tensor in weights(run / "final").items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    changes = arguments(folder / "run", "steps=4", "save_every=2")
    train(load_config(ROOT / "configs/debug.yaml", TrainConfig, changes), TOKENIZER, "cpu")
    return folder / "run"


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "zeroed at its end": lambda path: path.write_bytes(path.read_bytes()[:-10] + bytes(9) + b"\x01"),
}


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "feed_0.pt"]


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_to_a_checkpoint_is_noticed(trained: Path, tmp_path: Path, name: str, how: str) -> None:
    shutil.copytree(trained, tmp_path / "run")
    newest = tmp_path / "run/checkpoint-4"
    DAMAGE[how](newest / name)
    if name == "trainer_state.json" and how == "missing":
        assert newest not in list_checkpoints(tmp_path / "run")  # as if it were not there
        return
    assert name in find_damage(newest)
    with pytest.raises(ValueError, match=rf"checkpoint-4' is damaged: {name}.*name another checkpoint"):
        find_resume(tmp_path / "run", str(newest))
    assert find_resume(tmp_path / "run", "auto") == tmp_path / "run/checkpoint-2"


def test_a_damaged_checkpoint_falls_back_with_a_warning(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    DAMAGE["truncated"](run / "checkpoint-4/optimizer.pt")
    assert find_resume(run, "auto") == run / "checkpoint-2"
    assert "checkpoint-4' is damaged: optimizer.pt" in caplog.text
    assert f"going on from {run / 'checkpoint-2'}" in caplog.text
    DAMAGE["empty"](run / "checkpoint-2/model.safetensors")
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        find_resume(run, "auto")


def test_a_checkpoint_of_an_earlier_version_has_no_manifest(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    newest = tmp_path / "run/checkpoint-4"
    (newest / MANIFEST).unlink()
    assert find_damage(newest) == ""
    (newest / "scheduler.pt").unlink()
    assert find_damage(newest) == "scheduler.pt is missing"


@pytest.mark.slow
def test_a_sharded_checkpoint_goes_on_exactly_and_is_checked(settings, tmp_path: Path) -> None:
    """Written in the background by a process with whole weights, which are not in a model file."""
    sharded = ["sharded_checkpoints=true", "async_checkpoints=true", "ema.decay=0.9", "save_every=1", "log_every=1",
               "schedule.kind=constant"]  # fmt: skip
    train(settings("steps=3", *sharded, run="whole"), TOKENIZER, "cpu")
    train(settings("steps=2", *sharded), TOKENIZER, "cpu")
    newest = tmp_path / "run/checkpoint-2"
    assert not (newest / "model.safetensors").exists()
    part = next((newest / "state").glob("__0_*"))
    DAMAGE["zeroed at its end"](part)
    assert find_damage(newest) == f"state/{part.name} has other content than was written"
    train(settings("steps=3", *sharded), TOKENIZER, "cpu")  # from checkpoint-1
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    assert_same(tmp_path / "whole/final", tmp_path / "run/final")


def test_a_diverged_run_saves_nothing(settings, tmp_path: Path) -> None:
    """No line is logged before the first save and before `final`, so only the checks of these notice it."""
    for save_every, steps in ((2, 4), (0, 2)):
        run = tmp_path / f"run{save_every}"
        wild = settings(
            "optimizer.lr=1e30", f"steps={steps}", "schedule.warmup_steps=0", "log_every=100",
            f"save_every={save_every}", "precision=float32", run=run.name,
        )  # fmt: skip
        with pytest.raises(TrainingError, match=r"not finite"):
            train(wild, TOKENIZER, "cpu")
        assert not (run / "final").exists()
        for checkpoint in list_checkpoints(run):
            assert all(torch.isfinite(tensor).all() for tensor in weights(checkpoint).values())


def test_final_says_the_step_of_its_weights(settings, tmp_path: Path) -> None:
    for steps in (2, 1):
        train(settings(f"steps={steps}", "save_every=2"), TOKENIZER, "cpu")
        assert json.loads((tmp_path / "run/final/trained.json").read_text())["steps"] == 2


def test_a_finished_run_keeps_the_settings_that_trained_it(
    settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings("steps=1", "save_every=1", "optimizer.lr=1e-5"), TOKENIZER, "cpu")
    before = (tmp_path / "run/config.yaml").read_text()
    train(settings("steps=1", "save_every=1", "optimizer.lr=2e-5"), TOKENIZER, "cpu")
    assert (tmp_path / "run/config.yaml").read_text() == before
    assert "'optimizer.lr' was 1e-05 and is now 2e-05" in capsys.readouterr().err


def test_settings_that_do_not_fit_the_saved_state_are_named(settings) -> None:
    train(settings("steps=1", "save_every=1"), TOKENIZER, "cpu")
    for change, words in (
        ("optimizer.kind=muon", '\'optimizer.kind\' was "adamw" and is now "muon"'),
        ("data.seed=4", "'seed' was 0 and is now 4"),
    ):
        with pytest.raises(ValueError, match=words):
            train(settings("steps=2", change), TOKENIZER, "cpu")
