"""Evaluations of a debug model, all of it awake, on toy data in the official layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mm_interleaved import MMInterleaved, MMInterleavedProcessor
from mm_interleaved.evaluation import EvaluateConfig, Results, TaskSuite, evaluate
from mm_interleaved.tasks import TaskConfig

from ..tasks.conftest import FILES, PHASES, Written, written

__all__ = ["written"]
QUICK = {"num_inference_steps": 1, "num_candidates": 1, "max_new_tokens": 5, "min_new_tokens": 1, "num_beams": 2}
Run = Callable[..., Results]
MakeTask = Callable[..., TaskConfig]


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in float32 depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def task(written: Written) -> Callable[..., TaskConfig]:
    """Settings of a task on toy data."""

    def make(kind: str, /, **settings: Any) -> TaskConfig:
        form, images = FILES[kind]
        phase = PHASES.get(kind, "val")
        folder = written(form, "train" if phase == "train" else "val")
        paths = {"images": str(folder / images), "annotations": str(folder), "phase": phase, "limit": 4}
        return TaskConfig(kind, **{**paths, "generation": QUICK, **settings})

    return make


@pytest.fixture
def run(model: MMInterleaved, processor: MMInterleavedProcessor, tmp_path: Path) -> Run:
    """Evaluate tasks in this process."""

    def call(*tasks: TaskConfig, folder: str = "out", **settings: Any) -> Results:
        suite = TaskSuite(list(tasks), **{"batch_size": 2, "workers": 1, **settings})
        found = evaluate(suite, model, processor, tmp_path / folder, name="awake")
        assert found is not None
        return found

    return call


@pytest.fixture(scope="session")
def checkpoint(
    model: MMInterleaved, processor: MMInterleavedProcessor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of the awake model."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def settings_file(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """A YAML file for `mmi evaluate`."""

    def write(*tasks: TaskConfig, **settings: Any) -> Path:
        config = EvaluateConfig(list(tasks), output=str(tmp_path / "out"), model=str(checkpoint), **settings)
        plain = {k: v for k, v in vars(config).items() if k != "metrics"}
        plain["tasks"] = [vars(replace(t)) for t in config.tasks]
        path = tmp_path / "evaluate.yaml"
        path.write_text(yaml.safe_dump(plain | {"metrics": vars(config.metrics)}))
        return path

    return write


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that must not depend on how a run went: predictions, images and scores."""
    kinds = ("*/predictions.jsonl", "*/scores.jsonl", "*/images/*.png", "*/references/*.png")
    return {str(p.relative_to(folder)): p.read_bytes() for kind in kinds for p in sorted(folder.glob(kind))}


def figures(folder: Path) -> dict[str, Any]:
    """The tasks' results."""
    return json.loads((folder / "results.json").read_text())["tasks"]
