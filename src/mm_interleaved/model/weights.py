"""Whether weights may be read past their modules, and whether a captured CUDA graph of modules is still right.

A fast path reads `.weight` of a module and skips its `forward`. That is right only for a plain module: an adapter, a
quantized weight, a hook or a replaced `forward` change what the module computes, and only calling it does all of that.
A captured graph replays kernels: it runs no Python, so it sees neither hooks nor another active adapter.
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
    """Class decorator: `is_plain` accepts this class, whose forward uses no other weights than `weight` and `bias`."""
    _PLAIN_CLASSES.add(cls)
    return cls


def is_plain(*modules: nn.Module) -> bool:
    """Whether a fast path may read `weight` and `bias` of these modules instead of calling them.

    Each must be of exactly one of the known classes, with ordinary tensors in memory, and without hooks.
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
    # ZeRO leaves an empty tensor where it has partitioned a weight.
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
    """Whether hooks are registered on all modules; those by which PyTorch counts operations change nothing."""
    hooks = (
        *torch_module._global_forward_hooks.values(),
        *torch_module._global_forward_pre_hooks.values(),
        *torch_module._global_backward_hooks.values(),
        *torch_module._global_backward_pre_hooks.values(),
    )
    return any(getattr(hook, "__module__", None) != "torch.utils.module_tracker" for hook in hooks)


def readable(linear: nn.Module) -> Tensor | ScaledRows | None:
    """The weights of a linear layer as the decoding kernels read them.

    None: only the module itself knows what to do (LoRA, hooks, offloading, other kinds of quantization).
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
    """Whether any weight is."""
    return any(len(stored(p)) > 1 for p in module.parameters())


def stored(tensor: Tensor) -> list[Tensor]:
    """The ordinary tensors that hold `tensor`: itself, a quantized one's numbers and scales, a sharded one's part."""
    flatten = getattr(tensor, "__tensor_flatten__", None)  # PyTorch's protocol for tensors that wrap others
    inner = [] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]
    return [tensor] if flatten is None else [part for x in inner if isinstance(x, Tensor) for part in stored(x)]


# ----------------------------------------------------------------------------------------------------------------------
# Captured CUDA graphs


def state_of(*modules: nn.Module) -> Hashable:
    """All that decides whether a captured graph of `modules` is still right; equal states may share graphs.

    It holds the class, training flag and hooks of every module, the addresses of all parameters and buffers, the
    attributes that a class names in `switches`, and the active adapters of PEFT layers. Values of weights are not in
    it: a graph reads them anew at each replay. Autocast is in it, because a graph keeps the types of its kernels.
    """
    state: list[Hashable] = [_has_global_hooks(), *_autocast()]
    for module in _walk(modules):
        cls, own = type(module), module.__dict__
        state += (cls, own["training"], _is_intercepted(module))
        for tensors in (own["_parameters"], own["_buffers"]):
            for tensor in tensors.values():
                if type(tensor) in _ORDINARY:
                    state += (tensor.data_ptr(), tensor.dtype)  # memory that was freed may hold another type next
                elif tensor is not None:
                    state += (part.data_ptr() for part in stored(tensor))
        state += (own.get(name) for name in _switches(cls))
        if _is_peft_layer(cls):
            state.append(_adapter_state(cast(_AdapterLayer, module)))
    return tuple(state)


def _autocast() -> tuple[Hashable, ...]:
    """For each kind of device the type that autocast gives, or None."""
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
    """All modules below `modules`, each once, in a fixed order; several times as fast as `nn.Module.modules`."""
    found: dict[nn.Module, None] = dict.fromkeys(modules)
    waiting = list(found)
    for module in waiting:  # it grows
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
    """Attributes of a module by which its user chooses what its forward does."""
    return getattr(cls, "switches", ())


@cache
def _is_peft_layer(cls: type[nn.Module]) -> bool:
    # Models of transformers, diffusers and PEFT have something of the first name, but not both.
    return all(isinstance(getattr(cls, name, None), property) for name in ("active_adapters", "disable_adapters"))


@cache
def _is_sharded(cls: type[Tensor]) -> bool:
    return any(base.__name__ == "DTensor" for base in cls.__mro__)


class _AdapterLayer(Protocol):
    """A layer of PEFT, which may not be installed."""

    active_adapters: list[str]
    disable_adapters: bool


def _adapter_state(layer: _AdapterLayer) -> Hashable:
    """What of a PEFT layer changes its result besides weights."""
    scaling = getattr(layer, "scaling", None)
    scaling = tuple(sorted(scaling.items())) if isinstance(scaling, dict) else ()
    return (
        tuple(layer.active_adapters),
        bool(layer.disable_adapters),
        tuple(getattr(layer, "merged_adapters", ())),
        scaling,
    )
