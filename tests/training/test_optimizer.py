"""Parameter groups: the release's, to the last number, and what is said when a pattern fits nothing."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from mm_interleaved import MMInterleaved, MMInterleavedConfig
from mm_interleaved.configuration import load_config
from mm_interleaved.training.arguments import training_arguments
from mm_interleaved.training.config import (
    GroupConfig,
    MuonConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from mm_interleaved.training.muon import Muon
from mm_interleaved.training.optimizer import build_optimizer, parameter_groups, torch_groups, undecayed

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
        (18_259_968, 1e-5, 0.0),
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
    ("pattern", "message"), [("no_such_part", "matches no parameter"), ("(", "is not a regular expression")]
)
def test_a_pattern_that_cannot_be_meant_is_refused(model, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(model, OptimizerConfig(groups=[GroupConfig(pattern)]))


def rates(steps: int, tmp_path: Path, **schedule: Any) -> list[float]:
    """The shares of the learning rate at every step of a run."""
    config = RunConfig(output=str(tmp_path), steps=steps, precision="float32", schedule=ScheduleConfig(**schedule))
    args = training_arguments(config, "cpu")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps,
                              args.lr_scheduler_kwargs)  # fmt: skip
    found = []
    for _ in range(steps + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules(tmp_path: Path) -> None:
    cosine = rates(110, tmp_path, kind="cosine", warmup_steps=10, min_share=0.1)
    assert [cosine[s] for s in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert cosine[60] == pytest.approx(0.55)
    assert cosine[110] == pytest.approx(0.1)
    assert rates(10, tmp_path, kind="cosine")[10] == pytest.approx(0)
    assert rates(10, tmp_path, kind="constant", warmup_steps=2)[:4] == [0.0, 0.5, 1.0, 1.0]
    assert rates(10, tmp_path, kind="linear")[5] == 0.5
    with pytest.raises(ValueError, match="'min_share' is where a cosine ends"):
        ScheduleConfig(kind="linear", min_share=0.5)


class TwoKinds(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3)
        self.first, self.second = torch.nn.Linear(6, 10), torch.nn.Linear(6, 10)
        self.words = torch.nn.Embedding(7, 6)
        self.lm_head = torch.nn.Linear(10, 7)


def _trained(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 4
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest() -> None:
    torch.manual_seed(0)
    start = TwoKinds().state_dict()
    config = OptimizerConfig(kind="muon", lr=1e-2, weight_decay=0.1)
    model = TwoKinds()
    model.load_state_dict(start)
    found = _trained(model, [build_optimizer(model, config)])

    model.load_state_dict(start)
    matrices = [model.first.weight, model.second.weight]
    rest = [p for name, p in model.named_parameters() if "bias" in name]
    decayed = [model.words.weight, model.lm_head.weight]
    adamw = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.0}, {"params": decayed}], 1e-2, tuple(config.betas), config.eps, 0.1
    )
    muon = torch.optim.Muon(matrices, 1e-2, 0.1, 0.95, adjust_lr_fn="match_rms_adamw")
    expected = _trained(model, [adamw, muon])
    for name in ("words.weight", "lm_head.weight", "conv.bias", "first.bias"):
        torch.testing.assert_close(found[name], expected[name])
    for name in ("first.weight", "second.weight"):  # torch computes in bfloat16
        moved, wanted = found[name] - start[name], expected[name] - start[name]
        assert (moved - wanted).norm() < 0.03 * wanted.norm()


def test_a_convolution_is_a_matrix_of_its_outputs() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 6, 3, bias=False)
    matrix = torch.nn.Linear(27, 6, bias=False)
    matrix.weight.data.copy_(conv.weight.flatten(1))
    for module in (conv, matrix):
        optimizer = build_optimizer(module, OptimizerConfig(kind="muon", lr=1e-2))
        assert isinstance(optimizer, Muon)
        _trained(module, [optimizer])
    torch.testing.assert_close(conv.weight.flatten(1), matrix.weight)


def test_muon_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    model, config = TwoKinds(), OptimizerConfig(kind="muon", lr=1e-2)
    optimizer = build_optimizer(model, config)
    _trained(model, [optimizer])
    weights, state = deepcopy(model.state_dict()), deepcopy(optimizer.state_dict())
    expected = _trained(model, [optimizer], 1)
    model.load_state_dict(weights)
    again = build_optimizer(model, config)
    again.load_state_dict(state)
    assert all(torch.equal(x, expected[name]) for name, x in _trained(model, [again], 1).items())


def test_a_part_without_gradient_stays_where_it_is() -> None:
    torch.manual_seed(0)
    model = TwoKinds()
    optimizer = build_optimizer(model, OptimizerConfig(kind="muon", lr=1e-2))
    before = model.first.weight.detach().clone()
    for p in model.parameters():
        p.grad = None if p is model.first.weight else torch.ones_like(p)
    optimizer.step()
    assert torch.equal(model.first.weight, before)
    assert model.first.weight.grad is None


def test_muon_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="kind must be 'adamw' or 'muon', not 'sgd'"):
        OptimizerConfig(kind="sgd")
    with pytest.raises(ValueError, match="scale must be greater than 0, not 0"):
        MuonConfig(scale=0)
    with pytest.raises(ValueError, match="needs matrices, which 'deepspeed' makes flat"):
        load_config(
            CONFIGS / "release.yaml",
            TrainConfig,
            ["model.tokenizer=x", "optimizer.kind=muon", "deepspeed=configs/deepspeed/zero1.json"],
        )
    with pytest.raises(ValueError, match="not a regular expression"):
        build_optimizer(TwoKinds(), OptimizerConfig(kind="muon", muon=MuonConfig(plain=["("])))
