"""Settings of transformers' TrainingArguments under `trainer`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor

from mm_interleaved.configuration import load_config
from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.training.arguments import IDLE, OWNED, training_arguments, zero_stage
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.optimizer import build_optimizer
from mm_interleaved.training.run import train
from mm_interleaved.validation import ConfigError

from .conftest import ROOT, logged
from .stand_in import Colors


def test_another_optimizer_and_schedule_over_the_same_groups(settings, tmp_path: Path) -> None:
    config = settings(
        "steps=4", "log_every=1", "schedule.warmup_steps=0", "trainer.optim=sgd",
        "trainer.lr_scheduler_type=polynomial", "trainer.lr_scheduler_kwargs={power: 2.0}",
        "optimizer.groups=[{pattern: lm_head, lr: 0.01}]", "optimizer.lr=0.001",
    )  # fmt: skip
    train(config, TOKENIZER, "cpu", Colors)
    for group, rate in (("lm_head", 0.01), ("rest", 0.001)):
        rates = logged(tmp_path / "run", f"lr/{group}")
        left = [(1 - step / 4) ** 2 for step in range(1, 4)]
        assert [rates[step] / rate for step in (1, 2, 3)] == pytest.approx(left, abs=1e-3)


def test_the_values_of_optimizer_are_those_of_the_trainers_optimizer(settings) -> None:
    config = settings(
        "trainer.optim=adamw_torch", "optimizer.lr=0.02", "optimizer.eps=1e-5", "optimizer.betas=[0.7, 0.8]"
    )
    model = torch.nn.Linear(3, 2)
    args = training_arguments(config, "cpu")

    optimizer = build_optimizer(model, config.optimizer, Trainer.get_optimizer_cls_and_kwargs(args))
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"], optimizer.defaults["eps"]) == (
        0.02,
        (0.7, 0.8),
        1e-5,
    )
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, config.optimizer.weight_decay]
    args = training_arguments(settings("trainer.optim=adafactor"), "cpu")
    optimizer = build_optimizer(model, config.optimizer, Trainer.get_optimizer_cls_and_kwargs(args))
    assert isinstance(optimizer, Adafactor)


def test_an_optimizer_of_a_resumed_run_is_the_same(settings) -> None:
    train(settings("steps=1", "save_every=1", "trainer.optim=sgd"), TOKENIZER, "cpu", Colors)
    with pytest.raises(ValueError, match=r"'trainer.optim' was \"sgd\" and is now null"):
        train(settings("steps=2"), TOKENIZER, "cpu", Colors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["trainer.lr_scheduler_typ=linear"], "unknown key 'lr_scheduler_typ' in trainer. Did you mean"),
        (["trainer.learning_rate=1e-3"], "trainer.learning_rate is 'optimizer.lr' here"),
        (["trainer.num_train_epochs=3"], "is 'epochs' here"),
        (["trainer.gradient_checkpointing_kwargs={}"], "is 'gradient_checkpointing' here"),
        (["trainer.load_best_model_at_end=true"], "is 'early_stopping"),
        (["trainer.label_smoothing_factor=0.1"], "has no effect on runs of this package"),
        (["trainer.optim=adamw_8bitt"], "unknown value 'adamw_8bitt'. Did you mean 'adamw_8bit'"),
        (["trainer.optim=galore_adamw"], "makes its own groups of parameters"),
        (["trainer.optim=sgd", "optimizer.kind=muon"], "both name an optimizer"),
        (["trainer.lr_scheduler_type=reduce_lr_on_plateau"], "follows a metric of the Trainer's evaluation"),
        (["trainer.lr_scheduler_type=linear", "schedule.min_share=0.1"], "'schedule.min_share' has no effect"),
        (["trainer.report_to=tensorboard"], "written by 'tensorboard: true'"),
        (["trainer.report_to=[wandbb]"], "'wandbb' is no tracker that is installed here"),
        (["trainer.logging_first_step=sometimes"], "logging_first_step: Input should be a valid boolean, not"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used(settings, tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(settings(*changes), TOKENIZER, "cpu", Colors)
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize(
    ("change", "package", "message"),
    [
        ("trainer.report_to=wandb", "wandb", "'wandb' is no tracker that is installed here"),
        ("trainer.optim=adamw_8bit", "bitsandbytes", "trainer.optim 'adamw_8bit' cannot be used here"),
    ],
)
def test_packages_that_are_missing(settings, change: str, package: str, message: str) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=message):
        training_arguments(settings(change), "cpu")


def test_every_name_that_is_refused_is_one_of_the_trainers() -> None:
    """Except for those that other versions of transformers have."""
    known = set(TrainingArguments.__dataclass_fields__)
    assert (set(OWNED) | IDLE) - known <= {
        "warmup_ratio", "group_by_length", "local_rank", "enable_jit_checkpoint", "train_sampling_strategy", "use_cache"
    }  # fmt: skip


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_configurations_of_deepspeed_load(stage: int) -> None:
    settings = ["model.tokenizer=x", f"deepspeed={ROOT / f'configs/deepspeed/zero{stage}.json'}", "sample_every=0",
                "evaluate_every=0"]  # fmt: skip
    assert zero_stage(load_config(ROOT / "configs/release.yaml", TrainConfig, settings)) == stage


@pytest.mark.parametrize(
    ("content", "changes", "words"),
    [
        (None, [], "does not exist"),
        ("{", [], "is not JSON|not JSON"),
        ({}, [], "has no 'zero_optimization.stage' of 1, 2 or 3"),
        ({"zero_optimization": {"stage": 1}, "scheduler": {}}, [], "has 'scheduler', which is 'schedule' here"),
        ({"zero_optimization": {"stage": 3}}, [], "'final' has no weights"),
        (
            {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}},
            ["sample_every=1"],
            "need whole",
        ),
    ],
)
def test_a_configuration_of_deepspeed_that_does_not_fit(
    content: object, changes: list[str], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    config = load_config(ROOT / "configs/debug.yaml", TrainConfig, [f"deepspeed={path}", "sample_every=0", *changes])
    with pytest.raises(ConfigError, match=words):
        zero_stage(config)
