"""Parameter groups by name, and the optimizer over them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import nn

from .config import MuonConfig, OptimizerConfig
from .muon import Muon


@dataclass
class Group:
    """Parameters that share a learning rate.

    Attributes:
        name: the pattern of the group, or "rest".
        lr: learning rate.
        weight_decay: weight decay, except of biases, LayerNorms and parameters in `no_decay`.
        parameters: the parameters by name.
    """

    name: str
    lr: float
    weight_decay: float
    parameters: dict[str, nn.Parameter]

    def count(self) -> int:
        """The number of scalars in the group."""
        return sum(p.numel() for p in self.parameters.values())


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[Group]:
    """The trainable parameters, each in the first group whose pattern is found in its name, else in "rest".

    Patterns are regular expressions, searched anywhere in the name.

    Raises:
        ValueError: a pattern is not a regular expression, or matches no parameter of the model.
    """
    groups = [
        Group(
            g.pattern,
            config.lr if g.lr is None else g.lr,
            config.weight_decay if g.weight_decay is None else g.weight_decay,
            {},
        )
        for g in config.groups
    ]
    patterns = [_pattern(g.pattern, "optimizer.groups") for g in config.groups]
    rest = Group("rest", config.lr, config.weight_decay, {})
    names = []
    for name, parameter in model.named_parameters():
        names.append(name)
        if parameter.requires_grad:
            chosen = next((g for g, p in zip(groups, patterns, strict=True) if p.search(name)), rest)
            chosen.parameters[name] = parameter
    for pattern in patterns:
        if not any(pattern.search(name) for name in names):
            raise ValueError(
                f"optimizer.groups: the pattern '{pattern.pattern}' matches no parameter; `mmi info` lists the model's "
                f"parts, and its parameters are called, for instance, {', '.join(names[:: max(1, len(names) // 3)])}"
            )
    return [group for group in [*groups, rest] if group.parameters]


def _pattern(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: '{pattern}' is not a regular expression: {error}") from None


def undecayed(model: nn.Module, no_decay: list[str]) -> set[str]:
    """Names of parameters without weight decay: biases, parameters of LayerNorm modules, and those in `no_decay`.

    RMSNorm and GroupNorm gains do decay, as in the release (docs/model.md, "Optimizer groups"); `no_decay` can name
    them.
    """
    norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    patterns = [_pattern(p, "optimizer.no_decay") for p in no_decay]
    return {
        name
        for name, _ in model.named_parameters()
        if "bias" in name or name in norms or any(p.search(name) for p in patterns)
    }


def torch_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The groups for a torch optimizer, each split into parameters with and without weight decay, and Muon's."""
    plain = undecayed(model, config.no_decay)
    matrices = hidden_matrices(model, config.muon) if config.kind == "muon" else set()
    found = []
    for group in parameter_groups(model, config):
        shared = {"lr": group.lr, "name": group.name}
        for decays, hidden in product((True, False), (False, True)):
            both = (not decays, hidden)
            chosen = [p for name, p in group.parameters.items() if (name in plain, name in matrices) == both]
            if chosen:
                extra = {"momentum": config.muon.momentum, "scale": config.muon.scale} if hidden else {}
                decay = group.weight_decay if decays else 0.0
                found.append({"params": chosen, "weight_decay": decay, **shared, **extra})
    return found


def hidden_matrices(model: nn.Module, config: MuonConfig) -> set[str]:
    """Names of the parameters of Muon: weights of linear layers and convolutions, without those in `config.plain`."""
    patterns = [_pattern(p, "optimizer.muon.plain") for p in config.plain]
    layers = [(prefix, m) for prefix, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    names = {f"{prefix}.weight" if prefix else "weight" for prefix, _ in layers}
    return {name for name in names if not any(p.search(name) for p in patterns)}


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    own: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer over the groups; AdamW is fused if all parameters are on a CUDA device.

    Args:
        model: the trained model.
        config: kind and groups.
        own: class and arguments of another optimizer, from the Trainer's `optim`; None: AdamW or Muon.

    Raises:
        ValueError: nothing is trainable, or a group's pattern does not fit.
    """
    groups = torch_groups(model, config)
    if not groups:
        raise ValueError("no parameter of the model is trainable; see 'freeze' and model.overrides.frozen")
    if own is not None:
        kind, options = own
        if options.get("optim_bits") == 8 and find_spec("bitsandbytes"):
            _keep_embeddings(model)
        return kind(groups, **options)
    fused = all(p.device.type == "cuda" for g in groups for p in g["params"])
    kind = Muon if config.kind == "muon" else torch.optim.AdamW
    first, second = config.betas
    return kind(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=fused)


def _keep_embeddings(model: nn.Module) -> None:
    """Keep the state of embeddings in 32 bits, as the Trainer does with bitsandbytes: 8 bits are unstable there."""
    manager = import_module("bitsandbytes").optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
