"""Tasks are given to a model while it is trained, and training does not notice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mm_interleaved.configuration import load_config, to_yaml
from mm_interleaved.evaluation import TaskSuite
from mm_interleaved.io import InputError
from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.tasks import TaskConfig
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.run import train

from ..training.conftest import ROOT, arguments, logged
from .conftest import MakeTask, figures, lines
from .worker import finish, start


def settings(folder: Path, *tasks: TaskConfig) -> TrainConfig:
    config = load_config(ROOT / "configs/debug.yaml", TrainConfig, arguments(folder, "log_every=1", "steps=4"))
    evaluation = {"evaluation": TaskSuite(list(tasks), batch_size=2), "evaluate_every": 2} if tasks else {}
    return replace(config, save_every=0, **evaluation)


def test_scores_are_logged_and_losses_stay_the_same(task: MakeTask, tmp_path: Path) -> None:
    train(settings(tmp_path / "plain"), TOKENIZER, "cpu")
    (tmp_path / "with/evaluation/0000002/gqa").mkdir(parents=True)  # left by an interrupted run
    (tmp_path / "with/evaluation/0000002/gqa/predictions.jsonl").write_text("{}\n")
    (tmp_path / "with/evaluation/0000002/gqa/run.json").write_text("{}\n")
    train(settings(tmp_path / "with", task("gqa"), task("coco", limit=2)), TOKENIZER, "cpu")
    assert logged(tmp_path / "with") == logged(tmp_path / "plain")
    for key in ("eval_gqa/accuracy", "eval_coco/found_kind_color"):
        assert list(logged(tmp_path / "with", key)) == [2, 4]
    for step in ("0000002", "0000004"):
        folder = tmp_path / "with/evaluation" / step
        assert figures(folder)["gqa"]["evaluated"] == 4
        assert len(lines(folder / "coco/predictions.jsonl")) == 2


@pytest.mark.slow
def test_processes_that_train_together_evaluate_together(task: MakeTask, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(to_yaml(settings(tmp_path / "run", task("gqa", limit=3))))
    finish(config, start(config, processes=2, command="train"))
    for step in ("0000002", "0000004"):
        results = json.loads((tmp_path / "run/evaluation" / step / "results.json").read_text())
        assert results["machine"]["processes"] == 2
        assert results["tasks"]["gqa"]["evaluated"] == 3
    assert list(logged(tmp_path / "run", "eval_gqa/accuracy")) == [2, 4]
    assert list(logged(tmp_path / "run")) == [1, 2, 3, 4]


def test_missing_files_are_found_before_training(task: MakeTask, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        train(settings(tmp_path / "run", task("gqa", annotations=str(tmp_path))), TOKENIZER, "cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["evaluate_every=2"], "'evaluate_every' needs the tasks"),
        (
            ["evaluate_every=2", "evaluation={tasks: [{task: gqa}]}", "sample_every=0", "fsdp={fsdp_version: 2}"],
            "needs whole weights",
        ),
        (["evaluation={tasks: [{tusk: gqa}]}"], r"unknown key 'tusk' in evaluation.tasks\[0\]"),
    ],
)
def test_settings_that_do_not_fit(changes: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_config(ROOT / "configs/debug.yaml", TrainConfig, changes)
