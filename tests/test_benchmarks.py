"""The scripts that measure run, at sizes that say nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.training.recipes import load_recipe
from mm_interleaved.training.run import train
from toyworld.sampling import Split
from toyworld.writers import write_dataset
from toyworld.writers.base import Job

from .programs import Program

ROOT = Path(__file__).parents[1]


def measure(script: str, *arguments: object) -> str:
    done = Program(str(ROOT / "benchmarks" / script), *arguments)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err[-2000:]
    return out


@pytest.mark.parametrize("script", ["plot_tasks.py", "drawing.py", "startup.py", "finetune_tasks.py"])
def test_scripts_that_say_how_they_are_used(script: str) -> None:
    assert "python benchmarks/" + script in measure(script, "--help")


def test_tables_of_fine_tuning(tmp_path: Path) -> None:
    """Of the runs that there are, with the names of those that are missing."""
    (tmp_path / "results").mkdir()
    trained = {"seconds": 12.3, "memory_gib": 1.25, "trained_parameters": 1_330_000, "saved_bytes": 5_400_000}
    for method, value in (("zero", 1.0), ("lora", 40.0), ("full", 60.0)):
        found = {"value": value, "interval": [value - 1, value + 1]}
        run = {"task": "vqav2", "method": method, "seed": 0, "shifted": found, "base": {"vqav2": found, "coco": found}}
        text = json.dumps(run | ({} if method == "zero" else trained))
        (tmp_path / "results" / f"vqav2-{method}-0.json").write_text(text)
    said = measure("finetune_tasks.py", tmp_path, "--report", "--only", "vqav2")
    assert "| 1.0 (0.0 to 2.0) | 40.0 (39.0 to 41.0) | 60.0 (59.0 to 61.0) | 1.33 M, 1.33 M | 12, 12 |" in said
    assert "| vqav2 | full | 60.0 (59.0 to 61.0) | 60.0 (59.0 to 61.0) |" in said
    assert "Not run: vqav2-replay-0, vqav2-full-1, vqav2-lora-1." in said
    about = json.loads((tmp_path / "results.json").read_text())["about"]
    assert len(about["model_sha256"]) == 64


def test_deformable_attention(tmp_path: Path) -> None:
    measure("deformable.py", "--repeats", 1, "--cases", 1, "--output", tmp_path / "d.json")
    (line,) = json.loads((tmp_path / "d.json").read_text())["milliseconds"]
    assert min(line["maps"], line["rows"]) > 0


def test_inspection(tmp_path: Path) -> None:
    measure("inspection.py", "debug", "--questions", 3, "--output", tmp_path / "i.json")
    found = json.loads((tmp_path / "i.json").read_text())
    assert len(found["answers"]) == found["questions"] == 3
    assert 0 < found["area"] < 0.5
    assert 0 < found["p"] <= 1
    assert 0 <= found["hits"] <= 1


@pytest.mark.slow
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


@pytest.mark.slow
def test_quality(tmp_path: Path) -> None:
    measure("quality.py", "small", "--samples", 1, "--steps", 1, "--output", tmp_path / "q.json")
    found = json.loads((tmp_path / "q.json").read_text())
    assert {"captions", "questions", "drawing", "stories"} <= found.keys()


@pytest.mark.slow
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


@pytest.mark.slow
def test_finetuning(tmp_path: Path) -> None:
    sizes = ["--preset", "debug", "--device", "cpu", "--length", 256, "--steps", 1]
    measure("finetuning.py", "run", "lora-vqa", *sizes, "--output", tmp_path / "m.json")
    measure("finetuning.py", "estimate", tmp_path / "m.json", "--output", tmp_path / "f.json")
    (row,) = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert row["tokens_per_second"] > 0
    assert row["estimated"] == sum(row["estimated_parts"].values())


@pytest.mark.slow
def test_fifty_steps_of_one_task_teach_it(tmp_path: Path) -> None:
    """The small model, questions of a world that it never saw, by the recipe; scored on other scenes."""
    sources = {}
    wanted: tuple[tuple[Split, int], ...] = (("train", 80), ("val", 12))
    for split, count in wanted:
        folder = tmp_path / split
        write_dataset("vqav2", folder, Job(count, split, 0, 64, "shifted"))
        options = {"task": "vqav2", "phase": split, "annotations": str(folder), "images": str(folder)}
        sources[split] = json.dumps([{"type": "task", "name": split, "options": options}])
    changes = [
        "steps=50", "optimizer.lr=3e-3", "schedule.warmup_steps=5", "data.batch_size=1", "data.max_length=200",
        f"data.sources={sources['train']}", "eval_every=10", "eval_batches=2", "log_every=10", "save_every=0",
        f"eval_data={{max_length: 200, sources: {sources['val']}}}", "evaluation=null", "sample_every=0",
        "tensorboard=false",
    ]  # fmt: skip
    config = load_recipe("vqa", "small", None, str(tmp_path / "run"), changes)
    train(config, TOKENIZER, "cpu")
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    loss = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert sorted(loss) == [10, 20, 30, 40, 50]
    assert loss[50] < 0.7 * loss[10], loss
