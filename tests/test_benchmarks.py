"""The scripts that measure run, at sizes that say nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .programs import Program

ROOT = Path(__file__).parents[1]


def measure(script: str, *arguments: object) -> str:
    done = Program(str(ROOT / "benchmarks" / script), *arguments)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err[-2000:]
    return out


@pytest.mark.parametrize("script", ["plot_tasks.py", "drawing.py", "startup.py"])
def test_scripts_that_say_how_they_are_used(script: str) -> None:
    assert "python benchmarks/" + script in measure(script, "--help")


def test_deformable_attention(tmp_path: Path) -> None:
    measure("deformable.py", "--repeats", 1, "--cases", 1, "--output", tmp_path / "d.json")
    (line,) = json.loads((tmp_path / "d.json").read_text())["milliseconds"]
    assert min(line["maps"], line["rows"]) > 0


def test_tasks(tmp_path: Path) -> None:
    sizes = ["--preset", "debug", "--device", "cpu", "--dtype", "float32", "--samples", 4, "--batches", 2]
    measure("evaluation.py", *sizes, "--output", tmp_path / "e.json")
    found = json.loads((tmp_path / "e.json").read_text())
    for task in ("coco_karpathy", "vqav2"):
        (row,) = found[task]
        assert row["samples"] == 8 * 2  # batches
        assert row["samples_per_second"] > 0
        assert 0 < row["model_share"] <= 1


def test_data(tmp_path: Path) -> None:
    changes = ["data.batch_size=2", "data.sources.0.batch_size=2", "data.sources.0.max_length=256"]
    options = ["--preset", "debug", "--seconds", 1, "--output", tmp_path / "l.json"]
    measure("loader.py", "configs/small/pretrain.yaml", *changes, *options)
    (rates,) = json.loads((tmp_path / "l.json").read_text())["rates"]
    assert min(rates[f"{name}/s"] for name in ("rows", "tokens", "images")) > 0


def test_quality(tmp_path: Path) -> None:
    measure("quality.py", "small", "--samples", 1, "--steps", 1, "--output", tmp_path / "q.json")
    found = json.loads((tmp_path / "q.json").read_text())
    assert {"captions", "questions", "drawing", "stories"} <= found.keys()


def test_quality_of_what_mmfs_is_for(tmp_path: Path) -> None:
    """Places, boxes and images after others are asked for where they are named."""
    sizes = ["--samples", 2, "--drawn", 1, "--each", 1, "--types", "where", "count", "--steps", 1]
    tasks = ["--tasks", "typed", "boxes", "frames"]
    measure("quality.py", "small", *sizes, *tasks, "--output", tmp_path / "q.json")
    found = json.loads((tmp_path / "q.json").read_text())
    assert found["typed"]["n_where"] + found["typed"]["n_count"] == found["typed"]["questions"] > 0
    assert found["boxes"].keys() >= {"accuracy", "mean_iou"}
    assert found["boxes"]["boxes"] == 2
    assert found["frames"]["frames"] in range(2, 5)


def test_finetuning(tmp_path: Path) -> None:
    sizes = ["--preset", "debug", "--device", "cpu", "--length", 256, "--steps", 1]
    measure("finetuning.py", "run", "lora-vqa", *sizes, "--output", tmp_path / "m.json")
    measure("finetuning.py", "estimate", tmp_path / "m.json", "--output", tmp_path / "f.json")
    (row,) = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert row["tokens_per_second"] > 0
    assert row["estimated"] == sum(row["estimated_parts"].values())
