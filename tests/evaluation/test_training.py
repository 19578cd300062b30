"""Tasks are given to a model while it is trained, and training does not notice."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mm_interleaved.cli import main
from mm_interleaved.configuration import load_config, to_yaml
from mm_interleaved.evaluation import EvaluateConfig, TaskSuite
from mm_interleaved.io import InputError
from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.tasks import TaskConfig
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.run import train

from ..programs import Program, run_together
from ..tasks.conftest import Written
from ..training.conftest import ROOT, arguments, logged
from .conftest import MakeTask, contents, figures, lines
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


def test_the_values_are_those_of_mmi_evaluate(task: MakeTask, tmp_path: Path) -> None:
    """On the checkpoint of the same step, with the same settings: every sample's prediction and every value."""
    suite = [task("gqa"), task("coco_karpathy", limit=2), task("refcoco", limit=2), task("coco", limit=1)]
    train(replace(settings(tmp_path / "run", *suite), save_every=2), TOKENIZER, "cpu")
    config = EvaluateConfig(suite, batch_size=2, output=str(tmp_path / "alone"), model=str(tmp_path / "run/last"))
    (tmp_path / "tasks.yaml").write_text(to_yaml(config))
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--device", "cpu", str(tmp_path / "tasks.yaml")])
    assert not ended.value.code
    inside, outside = (figures(tmp_path / folder) for folder in ("run/evaluation/0000004", "alone"))
    assert {name: of["metrics"] for name, of in inside.items()} == {n: of["metrics"] for n, of in outside.items()}
    for name in ("gqa", "coco_karpathy", "refcoco"):
        one, two = (lines(tmp_path / folder / name / "predictions.jsonl")
                    for folder in ("run/evaluation/0000004", "alone"))  # fmt: skip
        assert [record["prediction"] for record in one] == [record["prediction"] for record in two]
    drawn = [sorted((tmp_path / folder / "coco").rglob("*.png")) for folder in ("run/evaluation/0000004", "alone")]
    assert drawn[0]
    assert [path.read_bytes() for path in drawn[0]] == [path.read_bytes() for path in drawn[1]]


@pytest.mark.slow
def test_a_killed_run_on_tasks_goes_on_as_if_nothing_had_happened(
    task: MakeTask, written: Written, tmp_path: Path
) -> None:
    """Items of a task, a task metric that decides, and the links: all as in a run that was not killed."""
    folder = written("gqa", "train")
    items = {"task": "gqa", "phase": "train", "images": str(folder / "images"), "annotations": str(folder)}
    source = {"type": "task", "name": "questions", "batch_size": 1, "max_length": 96, "keep_remainder": True,
              "options": items}  # fmt: skip
    data = {"sources": [source]}
    stopping = {"metric": "gqa/accuracy", "patience": None}
    for run in ("whole", "killed"):
        config = replace(settings(tmp_path / run, task("gqa", limit=2)), steps=12, save_every=2, evaluate_every=4)
        plain = yaml.safe_load(to_yaml(config)) | {"data": data, "early_stopping": stopping}
        (tmp_path / f"{run}.yaml").write_text(yaml.safe_dump(plain))
    command = ("mm_interleaved.cli", "train", "--device", "cpu", str(tmp_path / "killed.yaml"))
    process = Program(*command, merge=True)
    while process.poll() is None and not (tmp_path / "killed/checkpoint-4").is_dir():
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/final").exists()
    for run in ("whole", "killed"):
        train(load_config(tmp_path / f"{run}.yaml", TrainConfig), TOKENIZER, "cpu")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert logged(whole) == logged(killed)
    assert logged(whole, "eval_gqa/accuracy") == logged(killed, "eval_gqa/accuracy")
    assert os.readlink(whole / "best") == os.readlink(killed / "best")
    assert os.readlink(whole / "last") == os.readlink(killed / "last") == "checkpoint-12"
    one, two = (load_file(run / "final/model.safetensors") for run in (whole, killed))
    assert all(torch.equal(one[name], two[name]) for name in one)


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


@pytest.mark.slow
def test_sharded_weights_have_the_values_of_whole_ones(task: MakeTask, tmp_path: Path) -> None:
    """Two processes with FSDP, against one process with the weights that they write after the same step."""
    suite = [task("gqa"), task("coco_karpathy", limit=3), task("coco", limit=2)]
    tasks = yaml.safe_load(to_yaml(settings(tmp_path / "run", *suite)))["evaluation"]
    changes = arguments(
        tmp_path / "run", "steps=4", "log_every=1", "save_every=0", "ema.decay=0.5", "fsdp={fsdp_version: 2}",
        "evaluate_every=2", f"evaluation={json.dumps(tasks)}",
    )  # fmt: skip
    well, said = run_together(2, "tests.training.stand_in", "--mixed", "--shard", *changes, OMP_NUM_THREADS="1")
    assert well, said[-3000:]
    assert list(logged(tmp_path / "run", "eval_gqa/accuracy")) == [2, 4]
    alone = EvaluateConfig(suite, batch_size=2, output=str(tmp_path / "alone"), model=str(tmp_path / "run/final"))
    (tmp_path / "tasks.yaml").write_text(to_yaml(alone))
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--device", "cpu", str(tmp_path / "tasks.yaml")])
    assert not ended.value.code
    inside, outside = (tmp_path / folder for folder in ("run/evaluation/0000004", "alone"))
    assert json.loads((inside / "results.json").read_text())["machine"]["processes"] == 2
    assert {name: of["metrics"] for name, of in figures(inside).items()} == {
        name: of["metrics"] for name, of in figures(outside).items()
    }
    assert contents(inside) == contents(outside)


def test_missing_files_are_found_before_training(task: MakeTask, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        train(settings(tmp_path / "run", task("gqa", annotations=str(tmp_path))), TOKENIZER, "cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["evaluate_every=2"], "'evaluate_every' needs the tasks"),
        (["evaluation={tasks: [{tusk: gqa}]}"], r"unknown key 'tusk' in evaluation.tasks\[0\]"),
    ],
)
def test_settings_that_do_not_fit(changes: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_config(ROOT / "configs/debug.yaml", TrainConfig, changes)
