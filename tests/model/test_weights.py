"""When weights may be read past their modules, and when a captured CUDA graph of modules is still right."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from mm_interleaved.model.config import MMFSConfig
from mm_interleaved.model.language_model import RMSNorm
from mm_interleaved.model.mmfs import MMFS
from mm_interleaved.model.unet import LearnedNorm
from mm_interleaved.model.weights import is_intercepted, is_plain, readable, state_of, why_not_captured


def _replace_forward(linear: nn.Linear) -> None:
    linear.forward = lambda x: x


def _hook_of(kind: str) -> Callable[[nn.Linear], None]:
    return lambda linear: getattr(linear, f"register_{kind}")(lambda *_: None) and None


class Subclass(nn.Linear):
    """It may compute anything."""


class Wrapping(torch.Tensor):
    """It may hold anything."""


INTERCEPTED = {
    "hook": _hook_of("forward_hook"),
    "pre-hook": _hook_of("forward_pre_hook"),
    "backward hook": _hook_of("full_backward_hook"),
    "backward pre-hook": _hook_of("full_backward_pre_hook"),
    "forward": _replace_forward,
}
CHANGED = INTERCEPTED | {
    "subclass": lambda m: setattr(m, "__class__", Subclass),
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
    "offloaded": lambda m: m.to("meta") and None,
    "partitioned": lambda m: setattr(m, "weight", nn.Parameter(torch.empty(0))),
    "tensor subclass": lambda m: setattr(m, "weight", nn.Parameter(torch.ones(3, 2).as_subclass(Wrapping))),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_module_that_is_not_plain(kind: str) -> None:
    linear = nn.Linear(2, 3)
    assert is_plain(linear, nn.Conv2d(1, 1, 1), LearnedNorm(2), RMSNorm(2), nn.Embedding(2, 2), nn.LayerNorm(2))
    assert readable(linear) is linear.weight
    CHANGED[kind](linear)
    assert not is_plain(nn.Linear(2, 2), linear)
    assert readable(linear) is None
    assert is_intercepted(nn.Linear(2, 2), linear) == (kind in INTERCEPTED)


def test_modules_without_a_bias_are_plain() -> None:
    assert is_plain(nn.Linear(2, 3, bias=False))


def test_hooks_on_all_modules_count_but_not_those_that_count_operations() -> None:
    linear = nn.Linear(2, 3)
    with FlopCounterMode(display=False):
        assert is_plain(linear)
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert not is_plain(linear)
        assert is_intercepted(linear)
        assert "global hooks" in why_not_captured(linear)
    finally:
        handle.remove()
    assert is_plain(linear)


def test_an_unknown_module_is_not_plain() -> None:
    assert not is_plain(nn.Sequential())
    assert readable(nn.Sequential()) is None


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model = get_peft_model(model, LoraConfig(target_modules=["0"], r=1), adapter_name="first")
    model.add_adapter("second", LoraConfig(target_modules=["0"], r=1, lora_alpha=3))
    return model


def _scale(model: nn.Module) -> None:
    model.base_model.model[0].scaling["first"] *= 2


STATES = {
    "weights": lambda m: setattr(m.base_model.model[1], "weight", nn.Parameter(torch.ones(2))),
    "data": lambda m: setattr(m.base_model.model[1].weight, "data", torch.ones(2)),
    "buffers": lambda m: setattr(m.base_model.model[1], "running_mean", torch.ones(2)),
    "training": lambda m: m.train(not m.training),
    "hook": lambda m: m.base_model.model[1].register_forward_hook(lambda *_: None),
    "class": lambda m: setattr(m.base_model.model[1], "__class__", nn.BatchNorm2d),
    "adapter": lambda m: m.set_adapter("second"),
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "merged": lambda m: m.merge_adapter(["first"]),
    "scaling": _scale,
}


@pytest.mark.parametrize("kind", STATES)
def test_what_a_captured_graph_depends_on(kind: str) -> None:
    model = adapted()
    before = state_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # values are read by each replay
    assert state_of(model) == before
    assert state_of(copy.deepcopy(model)) != before
    STATES[kind](model)
    assert state_of(model) != before


def test_switches_are_part_of_the_state() -> None:
    mmfs = MMFS(MMFSConfig(hidden_size=8, levels=[2], num_heads=2, num_points=3), query_size=4, feature_size=4)
    before = state_of(mmfs)
    mmfs.implementation = "reference"
    assert state_of(mmfs) != before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (INTERCEPTED["hook"], "a Linear: it has hooks"),
        (INTERCEPTED["pre-hook"], "a Linear: it has hooks"),
        (INTERCEPTED["forward"], "a Linear: its forward was replaced"),
        (CHANGED["subclass"], "test_weights.Subclass is not a module of a package"),
        (CHANGED["offloaded"], "offloaded"),
    ],
)
def test_what_cannot_be_captured(change: Callable[[nn.Linear], None], reason: str) -> None:
    linear = nn.Linear(2, 2)
    model = nn.Sequential(nn.Linear(2, 2), linear)
    assert why_not_captured(model, nn.LayerNorm(2)) is None
    change(linear)
    assert reason in why_not_captured(nn.LayerNorm(2), model)
    assert why_not_captured(adapted()) is None
