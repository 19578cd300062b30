"""Modules that compute what the model's own do, made for training on narrow maps of many rows.

PyTorch's layer norm runs one program for each row, which is a waste for rows of 16 to 192 numbers, and its sums over
rows (gradients of biases) run in few programs. The kernels here take many rows at a time, in as many programs as fill a
GPU (`kernels.py`). `quicken` puts them into a model; parameters and their names stay.

Sums run in float32, results have the type of the input. Axes: R rows, D channels.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mm_interleaved.model import MMInterleavedModel
from mm_interleaved.model.rms_norm import RMSNorm
from mm_interleaved.model.unet import UNetSynchronizer
from mm_interleaved.model.vit_adapter import ChannelNorm, DeformableAttention, ViTAdapter
from mm_interleaved.model.weights import plain_class
from mm_interleaved.ops.mmfs_attention import on_triton

_PROGRAMS = 1056  # eight for each multiprocessor of an H200
_TILE = 2048  # numbers that a program holds at a time


def _power(width: int) -> int:
    """The smallest power of 2 that is not smaller."""
    return 1 << (width - 1).bit_length()


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def _blocks(rows: int, width: int) -> tuple[int, int, int]:
    """Channels and rows of a tile, and programs."""
    block_d = _power(width)
    block_r = max(1, _TILE // block_d)
    return block_d, block_r, min(_parts(rows, block_r), _PROGRAMS)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        from .kernels import norm_forward

        x = x.contiguous()
        width = x.shape[-1]
        rows, y = x.numel() // width, torch.empty_like(x)
        block_d, block_r, _ = _blocks(rows, width)
        centred = bias is not None
        norm_forward[(_parts(rows, block_r),)](x, weight, bias, y, rows, eps, width, centred, block_r, block_d)
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.centred = eps, centred
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # of one result
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        from .kernels import norm_backward

        x, weight = ctx.saved_tensors
        grad, width = grad.contiguous(), x.shape[-1]
        rows, of_x = x.numel() // width, torch.empty_like(x)
        block_d, block_r, programs = _blocks(rows, width)
        sums = torch.empty(2, programs, width, dtype=torch.float32, device=x.device)
        norm_backward[(programs,)](
            x, weight, grad, of_x, sums[0], sums[1], rows, ctx.eps, width, ctx.centred, block_r, block_d
        )
        of_weight, of_bias = sums.sum(1).to(weight.dtype).unbind()
        return of_x, of_weight, of_bias if ctx.centred else None, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`F.layer_norm` over the last axis of `x` [..., D]."""
    if on_triton(x.device) and x.numel():
        return _Norm.apply(x, weight, bias, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` over the last axis of `x` [..., D]."""
    if on_triton(x.device) and x.numel():
        return _Norm.apply(x, weight, None, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def sum_rows(x: Tensor) -> Tensor:
    """float32 [D], the sum of the rows of `x` [R, D]."""
    rows, width = x.shape
    if not on_triton(x.device):
        return x.sum(0, dtype=torch.float32)
    from .kernels import add_rows

    x = x.contiguous()
    block_d = min(_power(width), 256)
    block_r = _TILE // block_d
    programs = min(_parts(rows, block_r), _PROGRAMS // 2)
    out = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    add_rows[(programs, _parts(width, block_d))](x, out, rows, width, block_r, block_d)
    return out.sum(0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # of one result
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        of_x = (flat @ weight).view_as(x) if ctx.needs_input_grad[0] else None
        of_weight = flat.T @ x.reshape(-1, x.shape[-1])
        return of_x, of_weight, sum_rows(flat).to(weight.dtype)


@plain_class
class FastLayerNorm(nn.LayerNorm):
    """nn.LayerNorm through `layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., D]."""
        return layer_norm(input, self.weight, self.bias, self.eps)


@plain_class
class FastRMSNorm(RMSNorm):
    """RMSNorm through the kernels."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D]."""
        if on_triton(hidden_states.device) and hidden_states.dtype == self.weight.dtype:
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class FastChannelNorm(ChannelNorm):
    """ChannelNorm through `layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, height, width]."""
        return layer_norm(x.movedim(1, -1), self.weight, self.bias, self.eps).movedim(-1, 1)


@plain_class
class FastLinear(nn.Linear):
    """nn.Linear whose gradient of the bias is `sum_rows`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., D]."""
        if self.bias is None or input.numel() < 2**16:
            return F.linear(input, self.weight, self.bias)
        return _Linear.apply(input, self.weight, self.bias)


def _project(self: UNetSynchronizer, normed: Tensor) -> Tensor:
    """`UNetSynchronizer.project` with the norm's gain and bias in the projection: nothing large passes them."""
    mmfs, norm = self.mmfs, self.feature_norm
    weight, bias = mmfs.value_proj.weight, mmfs.value_proj.bias
    folded = F.linear(normed, weight * norm.weight, bias + weight @ norm.bias)
    return folded.unflatten(-1, (mmfs.config.num_heads, -1))


def _resized(self: ViTAdapter, tokens: Tensor, side: int) -> Tensor:
    """`ViTAdapter.resized` as a product with a fixed matrix, since `F.interpolate` is slow backward."""
    unit = torch.eye(self.grid**2, device=tokens.device).view(-1, 1, self.grid, self.grid)
    shares = F.interpolate(unit, size=(side, side), mode="bilinear", align_corners=False).flatten(1)
    return (shares.T.to(tokens.dtype) @ tokens).transpose(1, 2).unflatten(2, (side, side))


def quicken(model: MMInterleavedModel) -> None:
    """Put the modules of this file into the places of the model's own, with their weights; for training only."""
    places: dict[type[nn.Module], type[nn.Module]] = {
        nn.LayerNorm: FastLayerNorm, ChannelNorm: FastChannelNorm, RMSNorm: FastRMSNorm, nn.Linear: FastLinear,
    }  # fmt: skip
    for module in model.modules():
        if type(module) in places:
            module.__class__ = places[type(module)]
        if isinstance(module, UNetSynchronizer):
            module.project = MethodType(_project, module)
        if isinstance(module, ViTAdapter):
            module.resized = MethodType(_resized, module)
        if isinstance(module, DeformableAttention):
            module.backend = "auto"
