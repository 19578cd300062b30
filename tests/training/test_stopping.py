"""The best checkpoint by a task metric, and runs that stop when it no longer improves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mm_interleaved.cli import main
from mm_interleaved.evaluation import Results
from mm_interleaved.evaluation.scoring import TaskResult
from mm_interleaved.io import InputError
from mm_interleaved.pretrained import TOKENIZER, load
from mm_interleaved.training import tasks
from mm_interleaved.training.checkpoints import list_checkpoints
from mm_interleaved.training.config import TrainConfig, TrainingError
from mm_interleaved.training.run import train
from mm_interleaved.validation import ConfigError

from .stand_in import Colors

Scripted = Callable[..., TrainConfig]


@pytest.fixture
def scripted(settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """Settings of a run whose evaluation at step n finds the n-th of some values."""

    def make(
        values: list[float], *changes: str, metric: str = "gqa/accuracy", run: str = "run",
        known: list[str] | None = None,
    ) -> TrainConfig:  # fmt: skip
        def evaluate(suite, model, processor, folder: Path, **others: object) -> Results:
            value = {metric.rpartition("/")[2]: values[int(folder.name) - 1]}
            result = TaskResult("gqa", "val", metrics={"m": {"values": value}})
            return Results({}, {}, {"gqa": result})

        class Ready:
            name = "gqa"

            def samples(self):
                yield None

        monkeypatch.setattr(tasks, "evaluate", evaluate)
        monkeypatch.setattr(tasks, "make_task", lambda task: Ready())
        monkeypatch.setattr(tasks, "known_values", lambda task: known)
        return settings(
            f"steps={len(values)}", "save_every=0", "evaluate_every=1", "evaluation={tasks: [{task: gqa}]}",
            f"early_stopping.metric={metric}", "early_stopping.patience=2", *changes, run=run,
        )  # fmt: skip

    return make


def names(run: Path) -> list[str]:
    return [folder.name for folder in list_checkpoints(run)]


@pytest.mark.slow
def test_a_run_stops_when_nothing_improves(scripted: Scripted, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    values = [10.0, 30.0, 20.0, 30.0, 90.0]
    train(scripted(values, "keep_checkpoints=1"), TOKENIZER, "cpu", Colors)
    assert names(run) == ["checkpoint-2", "checkpoint-4"]  # the best one is kept, however old
    assert (os.readlink(run / "best"), os.readlink(run / "last")) == ("checkpoint-2", "checkpoint-4")
    shown = " ".join(capsys.readouterr().err.split())
    assert "stopped early at step 4 of 5: no improvement in 2 evaluations" in shown
    assert "gqa/accuracy 30 at step 2" in shown
    assert json.loads((run / "final/trained.json").read_text())["steps"] == 4
    before = (run / "final/model.safetensors").stat().st_mtime_ns
    train(scripted(values, "keep_checkpoints=1"), TOKENIZER, "cpu", Colors)
    assert "done already" in capsys.readouterr().err
    assert (run / "final/model.safetensors").stat().st_mtime_ns == before
    train(scripted(values, "keep_checkpoints=1", "early_stopping.patience=3"), TOKENIZER, "cpu", Colors)
    assert names(run) == ["checkpoint-5"]
    assert os.readlink(run / "best") == "checkpoint-5"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "changes", "metric", "best", "last"),
    [
        ([10, 11, 12, 13], ["early_stopping.min_delta=1.5"], "gqa/accuracy", 3, 4),
        ([10, 11, 9, 8, 12], [], "gqa/fid_64", 4, 5),
        ([10, 11, 9, 8, 12], ["early_stopping.mode=min"], "gqa/accuracy", 4, 5),
        ([10, 9, 8, 7], ["early_stopping.patience=null"], "gqa/accuracy", 1, 4),
        ([10, float("nan"), 12, float("nan"), float("nan"), 50], [], "gqa/accuracy", 3, 5),
    ],
)
def test_what_an_improvement_is(scripted: Scripted, tmp_path: Path, values, changes, metric, best, last) -> None:
    train(scripted(values, *changes, metric=metric), TOKENIZER, "cpu", Colors)
    assert os.readlink(tmp_path / "run/best") == f"checkpoint-{best}"
    assert json.loads((tmp_path / "run/final/trained.json").read_text())["steps"] == last


@pytest.mark.slow
def test_an_interrupted_run_decides_the_same(scripted: Scripted, tmp_path: Path) -> None:
    values = [10, 30, 20, 25, 90]
    for run, cut in (("whole", False), ("resumed", True)):
        train(scripted(values, "save_every=1", run=run), TOKENIZER, "cpu", Colors)
        if cut:  # as if it had been killed after step 3, before the links were changed
            for name in ("checkpoint-4", "final"):
                shutil.rmtree(tmp_path / run / name)
            for link in ("best", "last"):
                (tmp_path / run / link).unlink()
                (tmp_path / run / link).symlink_to("checkpoint-1")
            train(scripted(values, "save_every=1", run=run), TOKENIZER, "cpu", Colors)
        assert names(tmp_path / run)[-1] == "checkpoint-4"
        assert os.readlink(tmp_path / run / "best") == "checkpoint-2"
        assert os.readlink(tmp_path / run / "last") == "checkpoint-4"
    one, two = (load_file(tmp_path / run / "final/model.safetensors") for run in ("whole", "resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_best_of_an_average_is_a_model_of_its_own(scripted: Scripted, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(scripted([10, 30, 20], "ema.decay=0.5"), TOKENIZER, "cpu", Colors)
    assert not (run / "best").is_symlink()
    average, best = load_file(run / "checkpoint-2/ema.safetensors"), load_file(run / "best/model.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in average.items())
    assert load(run / "best").trained


def test_a_value_that_no_metric_of_the_task_has(scripted: Scripted, tmp_path: Path) -> None:
    """Refused before the first step, and nothing is left."""
    config = scripted([10], "early_stopping.metric=gqa/acuracy", known=["accuracy", "accuracy_compat"])
    message = r"task 'gqa' has no value 'acuracy', only accuracy, accuracy_compat. Did you mean 'accuracy'\?"
    with pytest.raises(InputError, match=message):
        train(config, TOKENIZER, "cpu", Colors)
    assert not (tmp_path / "run").exists()


def test_a_value_that_no_evaluation_has(scripted: Scripted, tmp_path: Path) -> None:
    """Some metrics do not say which values they have."""
    config = scripted([10, 20], "early_stopping.metric=gqa/acuracy")
    message = r"'gqa/acuracy' is not among the values .* at step 1: gqa/accuracy. Did you mean 'gqa/accuracy'\?"
    with pytest.raises(TrainingError, match=message):
        train(config, TOKENIZER, "cpu", Colors)
    assert names(tmp_path / "run") == ["checkpoint-1"]  # no step is lost
    assert not (tmp_path / "run/final").exists()
    train(scripted([10, 20]), TOKENIZER, "cpu", Colors)
    assert os.readlink(tmp_path / "run/best") == "checkpoint-2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["early_stopping.metric=accuracy"], "is TASK/VALUE"),
        (["early_stopping.metric=vqa/accuracy"], "'evaluation' has no task 'vqa', only gqa"),
        (["evaluate_every=0"], "follows a task metric: give 'evaluation' and 'evaluate_every'"),
        (["early_stopping.patience=0"], "patience must be at least 1"),
        (["early_stopping.mode=best"], "mode must be 'max' or 'min'"),
    ],
)
def test_settings_that_do_not_fit(scripted: Scripted, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scripted([10], *changes)


def test_the_report_of_a_run(scripted: Scripted, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    train(scripted([10, 30, 20, 25], "log_every=1"), TOKENIZER, "cpu", Colors)
    (run / "report.html").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run)])
    assert not ended.value.code
    shown = " ".join(capsys.readouterr().out.split())
    assert "step 4, finished, loss" in shown
    assert "10.00 (step 1)" in shown
    assert "25.00 (step 4)" in shown
    page = (run / "report.html").read_text()
    assert 'class="best">30.00' in page
    assert "best gqa/accuracy 30 at step 2" in page
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "is no folder of a run" in " ".join(capsys.readouterr().err.split())
