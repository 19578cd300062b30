"""The layers of a model that an adapter changes."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from ..io import InputError, nearest_name
from .settings import AdapterSettings

# Patterns, searched for in the names of modules.
PRESETS = {
    "llm": (r"^language_model\.layers\.\d+\.(self_attn|mlp)\.",),
    "image": (r"^image_decoder\.unet\..*\.attentions\.", r"^image_decoder\.resampler\."),
    "mmfs": (r"^language_model\.layers\.\d+\.synchronizer\.", r"^image_decoder\.unet\.synchronizers\."),
    "all": ("",),
}
PRESETS["both"] = PRESETS["llm"] + PRESETS["image"]
_NOT_TRAINED = "image_decoder.vae."  # no loss has gradients for the VAE


def adaptable_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers and convolutions that can have low-rank updates.

    Convolutions in groups have too few weights for one, and PEFT cannot merge it. No loss trains the VAE.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and getattr(module, "groups", 1) == 1
        and not name.startswith(_NOT_TRAINED)
    ]


def find_targets(model: nn.Module, settings: AdapterSettings, left_out: Collection[str] = ()) -> list[str]:
    """Names of the layers that the preset and the targets select.

    Args:
        model: the model.
        settings: the preset and the targets.
        left_out: names of layers that are not selected.

    Raises:
        InputError: the preset or a target selects none.
    """
    layers, chosen = [name for name in adaptable_layers(model) if name not in left_out], set()
    if settings.preset is not None:
        found = {name for name in layers if any(re.search(p, name) for p in PRESETS[settings.preset])}
        if not found:
            raise InputError(f"the preset '{settings.preset}' selects no layer of this model", "adapter.preset",
                             "Use another preset, or name layers with adapter.targets")  # fmt: skip
        chosen |= found
    for target in settings.targets:
        found = {name for name in layers if re.search(target, name)}
        if not found:
            raise _unmatched(model, target, layers)
        chosen |= found
    return [name for name in layers if name in chosen]


def _unmatched(model: nn.Module, target: str, layers: list[str]) -> InputError:
    """The error for a target that selects no layer."""
    others = [name for name, _ in model.named_modules() if name and re.search(target, name)]
    if others:
        problem = (f"'{target}' matches {others[0]}, which is no layer that an adapter can change (a linear layer or "
                   "convolution without groups, outside the VAE)")  # fmt: skip
        return InputError(problem, "adapter.targets", "Name others, or leave it out")
    last = sorted({part for name in layers for part in name.split(".") if not part.isdigit()})
    words = re.sub(r"\W+", ".", target).strip(".")
    wanted = words.rpartition(".")[2] or words
    return InputError(f"'{target}' matches no layer of the model", "adapter.targets", nearest_name(wanted, last))
