"""Recipes of fine-tuning: they can be read, their values say how sure they are, and each of them trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mm_interleaved.configuration import make_config
from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.run import train
from mm_interleaved.validation import ConfigError

from .conftest import ROOT

MODEL = {"init_from": {"preset": "debug"}}
DATA = {"sources": [{"type": "toyworld"}]}
LEAST = {"output": "run", "steps": 2, "model": MODEL, "data": DATA}


@pytest.mark.parametrize(
    ("override", "ours"),
    [
        ("learning_rate=1e-4", "optimizer.lr"),
        ("per_device_train_batch_size=2", "data.batch_size"),
        ("gradient_accumulation_steps=8", "accumulation"),
        ("freeze_vit=true", "freeze=[vision]"),
        ("optimizer.learning_rate=1", "optimizer.lr"),
        ("data.cutoff_len=512", "data.max_length"),
        ("lora-rank=8", "adapter.rank"),
    ],
)
def test_a_name_of_another_trainer_is_translated(override: str, ours: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as error:
        make_config(LEAST, TrainConfig, [override])
    assert f"'{ours}'" in str(error.value)


def test_a_mistyped_name_of_ours_still_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'log_every'"):
        make_config(LEAST, TrainConfig, ["log_evry=1"])


def test_samples_come_from_the_data(tmp_path: Path) -> None:
    """The last learned part is open; the page shows it before and after training beside what the data have."""
    shutil.copytree(ROOT / "examples", tmp_path / "data")
    source = {"type": "documents", "shards": ["training.jsonl"], "max_length": 96, "keep_remainder": True}
    config = make_config(
        LEAST | {
            "output": str(tmp_path / "run"), "precision": "float32", "tensorboard": False, "sample_every": 3,
            "data": {"root": str(tmp_path / "data"), "batch_size": 1, "mix": "row", "sources": [source]},
            "samples": {"from_data": True, "num_inference_steps": 2, "max_new_tokens": 4},
        },
        TrainConfig,
    )  # fmt: skip
    train(config, TOKENIZER, "cpu")
    steps = sorted(int(path.stem) for path in (tmp_path / "run/samples").glob("*.json"))
    assert steps == [0, 2]
    (caption, image, *_) = json.loads((tmp_path / "run/samples/0000002.json").read_text())
    assert [s["generated"] for s in caption["segments"]] == [False, True]
    assert caption["wanted"][0]["text"].startswith("Mila the fox has")
    assert image["segments"][-1]["image"] == "0000002_1_1.png"
    page = (tmp_path / "run/report.html").read_text()
    assert "step 0" in page
    assert all(f'src="samples/{name}"' in page for name in ("0000000_1_1.png", "0000002_1_1.png", "wanted_1.png"))
    assert (tmp_path / "run/samples/wanted_1.png").is_file()
