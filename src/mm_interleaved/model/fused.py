"""Linear layers fused with the norm before and the sum after them, by kernels for few rows.

A layer calls these functions instead of `linear(norm(x)) + residual`. With few rows, without gradients and on a CUDA
device they run the kernels of `ops/decoding.py`, which read each weight once. Otherwise, and if a module is wrapped,
hooked or quantized in a way that the kernels do not support, they call the modules.

Axes: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import project, project_gated, why_not_kernels
from ..ops.decoding import MOST_ROWS
from ..ops.scaled_rows import ScaledRows, Weights
from .rms_norm import RMSNorm
from .weights import is_plain, readable

# Most rows that the kernels multiply faster than the library, by type of weights (`mmi bench --only products`).
PLAIN_ROWS, SCALED_ROWS = 1, MOST_ROWS

Kernels = Literal["auto", "always", "never"]
_kernels: Kernels = "auto"


@contextmanager
def decoding_kernels(use: Kernels) -> Iterator[None]:
    """Choose whether decode steps run kernels, for tests and benchmarks. "auto" runs them on CUDA devices only."""
    global _kernels
    before, _kernels = _kernels, use
    try:
        yield
    finally:
        _kernels = before


def kernels_in_use() -> Kernels:
    """The choice of `decoding_kernels`, which is part of the state of a captured graph."""
    return _kernels


def kernels_for(x: Tensor, head_dim: int = 2) -> bool:
    """Whether to run the kernels of `ops/decoding.py` on hidden states like `x` [..., D]."""
    if _kernels == "never" or torch.is_grad_enabled() or (_kernels == "auto" and not x.is_cuda):
        return False
    return why_not_kernels(x, head_dim) is None


def _few_rows(x: Tensor) -> bool:
    return x.numel() // x.shape[-1] <= MOST_ROWS and kernels_for(x)


def _weights(x: Tensor, linears: Sequence[nn.Linear], norm: RMSNorm | None = None) -> list[Weights] | None:
    """The weights for the kernels; None: the modules must be called."""
    if norm is not None and not (is_plain(norm) and norm.weight.dtype == x.dtype):
        return None
    found: list[Weights] = []
    for linear in linears:
        weight = readable(linear)
        if weight is None or (isinstance(weight, Tensor) and weight.dtype != x.dtype):
            return None
        found.append(weight)
    kinds = {type(w) is ScaledRows for w in found}
    most = SCALED_ROWS if True in kinds else PLAIN_ROWS
    return found if len(kinds) == 1 and x.numel() // x.shape[-1] <= most else None


class _NormOptions(TypedDict, total=False):
    gain: Tensor
    eps: float


def _norm_options(norm: RMSNorm | None) -> _NormOptions:
    return {} if norm is None else {"gain": norm.weight, "eps": norm.variance_epsilon}


def linears(x: Tensor, modules: Sequence[nn.Linear], norm: RMSNorm | None = None) -> tuple[Tensor, ...]:
    """The outputs of several linear layers of norm(x), [B, L, outputs] each.

    Args:
        x: [B, L, D].
        modules: linear layers, or modules that wrap them; at most 3.
        norm: an RMS norm; None: no norm.
    """
    weights = _weights(x, modules, norm) if _few_rows(x) else None
    if weights is None:
        x = x if norm is None else norm(x)
        return tuple(module(x) for module in modules)
    biases = [module.bias for module in modules]
    out = project(x.flatten(0, -2), weights, biases, **_norm_options(norm), backend="triton")
    return out.unflatten(0, x.shape[:-1]).split([len(w) for w in weights], dim=-1)


def add_linear(residual: Tensor, x: Tensor, module: nn.Linear) -> Tensor:
    """residual + module(x), [B, L, outputs]."""
    weights = _weights(x, [module]) if _few_rows(x) else None
    if weights is not None:
        out = project(x.flatten(0, -2), weights, [module.bias], residual=residual.flatten(0, -2), backend="triton")
        return out.view_as(residual)
    if x.is_cuda and _few_rows(x) and not torch.is_autocast_enabled("cuda"):
        plain = readable(module)
        if isinstance(plain, Tensor) and module.bias is None and plain.dtype == x.dtype == residual.dtype:
            return torch.addmm(residual.flatten(0, -2), x.flatten(0, -2), plain.T).view_as(residual)
    return residual + module(x)


def affine(x: Tensor, weight: Tensor, bias: Tensor, norm: RMSNorm) -> Tensor:
    """norm(x) weight^T + bias, [B, L, outputs], for derived weights [outputs, D]."""
    if _few_rows(x) and len(x.flatten(0, -2)) <= PLAIN_ROWS and is_plain(norm) and norm.weight.dtype == x.dtype:
        out = project(x.flatten(0, -2), [weight], [bias], **_norm_options(norm), backend="triton")
        return out.unflatten(0, x.shape[:-1])
    return F.linear(norm(x), weight, bias)


def add_affine(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """residual + x weight^T + bias, [B, L, outputs], for derived weights [outputs, D]."""
    if _few_rows(x) and len(x.flatten(0, -2)) <= PLAIN_ROWS:
        out = project(x.flatten(0, -2), [weight], [bias], residual=residual.flatten(0, -2), backend="triton")
        return out.view_as(residual)
    return residual + F.linear(x, weight, bias)


def gated(x: Tensor, gate: nn.Linear, up: nn.Linear, norm: RMSNorm) -> Tensor | None:
    """silu(gate(norm(x))) * up(norm(x)), [B, L, inner width], by the kernel; None: the kernel cannot run."""
    weights = _weights(x, [gate, up], norm) if _few_rows(x) else None
    if weights is None or gate.bias is not None or up.bias is not None:
        return None
    out = project_gated(x.flatten(0, -2), *weights, **_norm_options(norm), backend="triton")
    return out.unflatten(0, x.shape[:-1])
