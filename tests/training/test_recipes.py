"""Recipes of fine-tuning: they can be read, their values say how sure they are, and each of them trains."""

from __future__ import annotations

import pytest

from mm_interleaved.configuration import make_config
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.validation import ConfigError

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
