"""Parameter groups: the release's, to the last number, and what is said when a pattern fits nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mm_interleaved import MMInterleaved, MMInterleavedConfig
from mm_interleaved.configuration import load_config
from mm_interleaved.training.config import GroupConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from mm_interleaved.training.optimizer import build_optimizer, parameter_groups, torch_groups, undecayed
from mm_interleaved.training.trainer import learning_rate_share

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def release() -> MMInterleaved:
    with torch.device("meta"):
        return MMInterleaved(MMInterleavedConfig.preset("release"))


@pytest.fixture(scope="module")
def release_optimizer() -> OptimizerConfig:
    return load_config(CONFIGS / "release.yaml", TrainConfig, ["model.tokenizer=x"]).optimizer


def test_the_release_groups_have_the_published_sizes(release, release_optimizer) -> None:
    groups = parameter_groups(release, release_optimizer)
    counts = [(g.count(), g.lr, g.weight_decay) for g in groups]
    assert counts == [
        (10, 1e-4, 0.0),
        (18_259_968, 1e-5, 0.05),
        (349_925_600, 1e-4, 0.05),
        (865_910_724, 1e-5, 0.05),
        (231_179_906, 1e-4, 0.05),
    ]


def test_biases_and_layer_norms_do_not_decay_but_other_norms_do(release) -> None:
    plain = undecayed(release, [])
    assert "visual_tokenizer.post_norm.weight" in plain
    assert "context_proj.bias" in plain
    assert not any("feature_norm.weight" in n for n in plain if n.startswith("language_model."))  # RMSNorm
    assert "image_decoder.unet.conv_norm_out.weight" not in plain  # GroupNorm
    assert "visual_tokenizer.encoder.level_embed" not in plain
    assert "image_decoder.unet.conv_norm_out.weight" in undecayed(release, [r"unet\..*norm"])


def test_every_trainable_parameter_is_in_exactly_one_group(model) -> None:
    config = OptimizerConfig(groups=[GroupConfig("gate", lr=1.0), GroupConfig("synchronizer", weight_decay=0.5)])
    groups = torch_groups(model, config)
    found = [id(p) for g in groups for p in g["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}
    gates = [g for g in groups if g["name"] == "gate"]
    assert [g["lr"] for g in gates] == [1.0]
    assert {g["weight_decay"] for g in groups} == {0.0, 0.05, 0.5}


@pytest.mark.parametrize(
    ("pattern", "message"), [("no_such_part", "fits no parameter"), ("(", "is not a regular expression")]
)
def test_a_pattern_that_cannot_be_meant_is_refused(model, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(model, OptimizerConfig(groups=[GroupConfig(pattern)]))


def test_schedules() -> None:
    cosine = learning_rate_share(ScheduleConfig("cosine", warmup_steps=10, min_share=0.1), 110)
    assert [cosine(s) for s in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert cosine(60) == pytest.approx(0.55)
    assert cosine(110) == pytest.approx(0.1)
    assert learning_rate_share(ScheduleConfig("constant"), 10)(9) == 1.0
    assert learning_rate_share(ScheduleConfig("linear"), 10)(5) == 0.5
