"""Checks of modules: may a fast path read their weights directly, and is a captured CUDA graph of them still valid?

A fast path reads `.weight` of a module and does not call it. That is correct for a plain module only: an adapter, a
quantized weight, a hook or a replaced `forward` changes the result, and only a call includes them. A captured graph
replays kernels and runs no Python, so it includes neither hooks nor a change of the active adapter.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import cache
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..ops.scaled_rows import ScaledRows

M = TypeVar("M", bound=nn.Module)

_KNOWN_PACKAGES = {"torch", "torchao", "transformers", "diffusers", "peft", "mm_interleaved"}
_ORDINARY = (nn.Parameter, Tensor)
_PLAIN_CLASSES: set[type[nn.Module]] = {nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm}


def plain_class(cls: type[M]) -> type[M]:
    """Class decorator: let `is_plain` accept this class, whose forward uses no weights but `weight` and `bias`."""
    _PLAIN_CLASSES.add(cls)
    return cls


def is_plain(*modules: nn.Module) -> bool:
    """Whether a fast path may read `weight` and `bias` of these modules instead of calling them.

    Each must be an instance of a known class (not of a subclass), with ordinary tensors in memory and without hooks.
    """
    return not _has_global_hooks() and all(
        type(m) in _PLAIN_CLASSES
        and _is_ordinary(m.weight)
        and (getattr(m, "bias", None) is None or _is_ordinary(m.bias))
        and not _is_intercepted(m)
        for m in modules
    )


def is_intercepted(*modules: nn.Module) -> bool:
    """Whether calling one of these modules runs more than its class's forward: hooks, or a replaced `forward`."""
    return _has_global_hooks() or any(_is_intercepted(m) for m in modules)


def _is_ordinary(weight: Any) -> bool:
    # DeepSpeed ZeRO leaves an empty tensor in place of a partitioned weight.
    return type(weight) in _ORDINARY and not weight.is_meta and weight.numel() > 0


def _is_intercepted(module: nn.Module) -> bool:
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def _has_global_hooks() -> bool:
    """Whether global module hooks are registered, except those of PyTorch's operation counter, which change nothing."""
    hooks = (
        *torch_module._global_forward_hooks.values(),
        *torch_module._global_forward_pre_hooks.values(),
        *torch_module._global_backward_hooks.values(),
        *torch_module._global_backward_pre_hooks.values(),
    )
    return any(getattr(hook, "__module__", None) != "torch.utils.module_tracker" for hook in hooks)


def readable(linear: nn.Module) -> Tensor | ScaledRows | None:
    """The weights of a linear layer in the form of the decoding kernels.

    None: the module must be called (LoRA, hooks, offloading, other kinds of quantization).
    """
    if type(linear) is not nn.Linear or is_intercepted(linear):
        return None
    weight = linear.weight
    if type(weight) in _ORDINARY:
        return weight if is_plain(linear) else None
    from torchao.quantization import Float8Tensor, Int8Tensor

    if not isinstance(weight, (Int8Tensor, Float8Tensor)) or weight.act_quant_kwargs is not None:
        return None
    if weight.scale.shape == (len(weight), 1) and weight.qdata.dtype in (torch.int8, torch.float8_e4m3fn):
        return ScaledRows(weight.qdata, weight.scale[:, 0])
    return None


def is_quantized(module: nn.Module) -> bool:
    """Whether any weight is quantized."""
    return any(len(stored(p)) > 1 for p in module.parameters())


def stored(tensor: Tensor) -> list[Tensor]:
    """The ordinary tensors inside `tensor`: itself, or those that a quantized or sharded tensor wraps."""
    flatten = getattr(tensor, "__tensor_flatten__", None)  # PyTorch's protocol for tensors that wrap others
    inner = [] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]
    return [tensor] if flatten is None else [part for x in inner if isinstance(x, Tensor) for part in stored(x)]


# ----------------------------------------------------------------------------------------------------------------------
# Captured CUDA graphs


def state_of(*modules: nn.Module) -> Hashable:
    """The state of `modules` that a captured graph depends on; equal states may share graphs.

    It consists of the class, training flag and hooks of every module, the addresses of all parameters and buffers, the
    attributes that a class names in `switches`, and the active adapters of PEFT layers. Values of weights are not part
    of it, because a graph reads them at each replay. Autocast is, because a graph has fixed types.
    """
    state: list[Hashable] = [_has_global_hooks(), *_autocast()]
    for module in _walk(modules):
        cls, own = type(module), module.__dict__
        state += (cls, own["training"], _is_intercepted(module))
        for tensors in (own["_parameters"], own["_buffers"]):
            for tensor in tensors.values():
                if type(tensor) in _ORDINARY:
                    state += (tensor.data_ptr(), tensor.dtype)  # freed memory may be reused for another type
                elif tensor is not None:
                    state += (part.data_ptr() for part in stored(tensor))
        state += (own.get(name) for name in _switches(cls))
        if _is_peft_layer(cls):
            state.append(_adapter_state(cast(_AdapterLayer, module)))
    return tuple(state)


def _autocast() -> tuple[Hashable, ...]:
    """For each type of device the dtype of autocast, or None."""
    kinds = ("cpu", "cuda")
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds)


def why_not_captured(*modules: nn.Module) -> str | None:
    """Why calls of `modules` cannot be captured in a CUDA graph; None: they can."""
    if _has_global_hooks():
        return "global hooks are registered on all modules, and a captured graph would not run them"
    devices = set()
    for module in _walk(modules):
        cls = type(module)
        if _is_intercepted(module):
            what = "its forward was replaced" if "forward" in module.__dict__ else "it has hooks"
            return f"a captured graph would not run what was added to a {cls.__name__}: {what}"
        if not _is_known(cls):
            return f"{cls.__module__}.{cls.__qualname__} is not a module of a package that is known to be capturable"
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    devices.add(tensor.device)
                    if _is_sharded(type(tensor)):
                        return "its weights are sharded over several processes"
    if len(devices) > 1 or any(d.type == "meta" for d in devices):
        return "its weights are offloaded, or spread over several devices"
    return None


def _walk(modules: tuple[nn.Module, ...]) -> Iterable[nn.Module]:
    """`modules` and all their submodules, each once, in a fixed order; several times as fast as `nn.Module.modules`."""
    found: dict[nn.Module, None] = dict.fromkeys(modules)
    waiting = list(found)
    for module in waiting:  # the list grows in the loop
        for child in module.__dict__["_modules"].values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return found


@cache
def _is_known(cls: type[nn.Module]) -> bool:
    return cls.__module__.partition(".")[0] in _KNOWN_PACKAGES


@cache
def _switches(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the attributes that change the forward pass of a module of this class."""
    return getattr(cls, "switches", ())


@cache
def _is_peft_layer(cls: type[nn.Module]) -> bool:
    # Models of transformers, diffusers and PEFT have an attribute of the first name, but not both.
    return all(isinstance(getattr(cls, name, None), property) for name in ("active_adapters", "disable_adapters"))


@cache
def _is_sharded(cls: type[Tensor]) -> bool:
    return any(base.__name__ == "DTensor" for base in cls.__mro__)


class _AdapterLayer(Protocol):
    """A layer of PEFT, which may not be installed."""

    active_adapters: list[str]
    disable_adapters: bool


def _adapter_state(layer: _AdapterLayer) -> Hashable:
    """The settings of a PEFT layer that change its result."""
    scaling = getattr(layer, "scaling", None)
    scaling = tuple(sorted(scaling.items())) if isinstance(scaling, dict) else ()
    return (
        tuple(layer.active_adapters),
        bool(layer.disable_adapters),
        tuple(getattr(layer, "merged_adapters", ())),
        scaling,
    )
