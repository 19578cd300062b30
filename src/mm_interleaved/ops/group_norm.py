"""Group norm (arXiv 1803.08494), optionally fused with SiLU, for maps in channels-last memory format.

    y = (x - mean) / sqrt(variance + eps) * weight + bias, over a group of channels and all pixels;  or silu(y)

PyTorch copies such a map to channels first, runs one program for each group of an image, and needs another pass for
SiLU. The Triton kernels (`group_norm_triton.py`) read the map twice and write it once, with enough programs to fill a
GPU; the backward pass reads the map and its gradient twice and writes once. So maps stay in channels-last format
between convolutions, which is the fast format for tensor cores. The kernels compute in float32 and round once, to the
type of `x`.

Under autocast PyTorch's group norm returns float32, and the next convolution casts it to half precision. The kernels
return half precision at once, so the convolution has the same input. Weights may be float32 when `x` is not.

Axes: B batch, C channels, h and w height and width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .devices import chooses_kernels, shapes_only
from .mmfs_attention import HAS_TRITON, KERNEL_DTYPES, Backend, on_triton

KERNELS = True  # False: "auto" uses PyTorch's operators everywhere, and the memory format of maps is not changed


def why_not_group_norm(x: Tensor) -> str | None:
    """Why the kernels cannot run on `x` [B, C, ...]; None: they can."""
    if not HAS_TRITON and not shapes_only():
        return "Triton is not installed"
    if not on_triton(x.device):
        return f"the kernels are for CUDA devices, and the map is on {x.device}"
    if x.dtype not in KERNEL_DTYPES:
        return f"the kernels support {', '.join(str(d) for d in KERNEL_DTYPES)}, not {x.dtype}"
    return None


def channels_last(x: Tensor) -> Tensor:
    """`x` [B, C, h, w] in channels-last memory format if the kernels can run on it, otherwise unchanged."""
    if KERNELS and chooses_kernels(x.device) and why_not_group_norm(x) is None:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    silu: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Group norm, then SiLU if `silu`.

    Args:
        x: [B, C, ...].
        groups: number of groups; divides C.
        weight, bias: [C], of any floating type; None: PyTorch's operators.
        eps: added to the variance.
        silu: whether SiLU follows.
        backend: "triton" (not in compiled code), "plain" or "auto". "auto" uses the kernels on a CUDA device if they
            can run and `x` is channels last, but not in compiled code, which the compiler fuses itself.

    Returns:
        [B, C, ...]. The kernels return the type and memory format of `x`, also under autocast.

    Raises:
        ValueError: backend="triton", but the kernels cannot run.
    """
    if _on_kernels(x, weight, bias, backend):
        return _Kernels.apply(x, groups, weight, bias, eps, silu)
    normed = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(normed) if silu else normed


def _on_kernels(x: Tensor, weight: Tensor | None, bias: Tensor | None, backend: Backend) -> bool:
    """Whether to run the kernels. "auto" uses them on CUDA devices only, not in Triton's interpreter."""
    if backend == "auto":
        wanted = (
            KERNELS
            and chooses_kernels(x.device)
            and not torch.compiler.is_compiling()
            and x.movedim(1, -1).is_contiguous()
        )
    else:
        wanted = backend == "triton"
    if not wanted:
        return False
    reason = "it lacks gain or bias" if weight is None or bias is None else why_not_group_norm(x)
    if reason is not None and backend == "triton":
        raise ValueError(f"group norm cannot run through Triton: {reason}")
    return reason is None


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` computed by `group_norm`, with the same parameter names."""

    def forward(self, input: Tensor, silu: bool = False) -> Tensor:
        """[B, C, ...], normalised, then SiLU if `silu`."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, silu)


def _rows(x: Tensor) -> Tensor:
    """`x` [B, C, ...] in channels-last memory format; a copy if it is in another one."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


class _Kernels(torch.autograd.Function):
    """The kernels with their gradients. Triton is imported at the first launch.

    Unlike the other kernels this is not a registered operator: the dispatcher costs the host 0.1 ms a call, a UNet has
    sixty group norms, and compiled code does not call them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
        x = _rows(x)
        if shapes_only():
            out, stats = torch.empty_like(x), x.new_empty((2, len(x), groups), dtype=torch.float32)
        else:
            from .group_norm_triton import group_norm as fused

            out, stats = fused(x, groups, weight, bias, eps, silu)
        ctx.silu = silu
        ctx.save_for_backward(x, stats, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # of one result
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, stats, weight, bias = ctx.saved_tensors
        if shapes_only():
            of_x, sums = torch.empty_like(x), stats.new_empty((2, *x.shape[:2]))
        else:
            from .group_norm_triton import group_norm_backward as fused

            of_x, sums = fused(_rows(grad), x, stats, weight, bias, ctx.silu)
        of_weight = sums[1].sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        of_bias = sums[0].sum(0).to(bias.dtype) if ctx.needs_input_grad[3] else None
        return of_x, None, of_weight, of_bias, None, None
