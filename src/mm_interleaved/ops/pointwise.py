"""Elementwise operators between the matrix products of a layer: rotary positions and gates.

    rotary      q, k -> q cos + rotated(q) sin, k cos + rotated(k) sin         (RoFormer, arXiv 2104.09864)
    silu_gate   g, u -> silu(g) * u                                            (GLU variants, arXiv 2002.05202)
    gelu_gate   (u, g) -> u * gelu(g), both halves of one tensor

Each has a reference implementation of a few PyTorch operators, all limited by memory bandwidth, and one Triton kernel
(`pointwise_triton.py`) that reads its inputs once and writes its result once, forward and backward. The kernels compute
in float32 and round once, at the end; PyTorch's operators round after each step in half precision.

Axes: B batch, L tokens, N heads, K key heads, H width of a head.
"""

from __future__ import annotations

from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from .decoding import WIDEST_HEAD, rotate
from .devices import chooses_kernels, shapes_only
from .mmfs_attention import HAS_TRITON, KERNEL_DTYPES, Backend, on_triton


def why_not_pointwise(*tensors: Tensor, head_dim: int = 2) -> str | None:
    """Why the kernels cannot run on `tensors`, in heads of `head_dim` channels; None: they can."""
    first = tensors[0]
    if not HAS_TRITON and not shapes_only():
        return "Triton is not installed"
    if not on_triton(first.device):
        return f"the kernels are for CUDA devices, and the tensors are on {first.device}"
    if first.dtype not in KERNEL_DTYPES or any(x.dtype != first.dtype for x in tensors):
        found = ", ".join(str(x.dtype) for x in tensors)
        return f"the kernels support {', '.join(str(d) for d in KERNEL_DTYPES)}, one at a time, not {found}"
    if head_dim > WIDEST_HEAD or head_dim % 2:
        return f"heads have {head_dim} channels; the kernels support even numbers up to {WIDEST_HEAD}"
    return None


def _on_kernels(backend: Backend, *tensors: Tensor, head_dim: int = 2) -> bool:
    """Whether to run the kernels. "auto" uses them on CUDA devices only, not in Triton's interpreter."""
    if backend == "plain" or (backend == "auto" and not chooses_kernels(tensors[0].device)):
        return False
    reason = why_not_pointwise(*tensors, head_dim=head_dim)
    if reason is not None and backend == "triton":
        raise ValueError(f"this cannot run through Triton: {reason}")
    return reason is None


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Query and key after rotary positions, in transformers' half-split layout.

    Args:
        query: [B, L, N, H].
        key: [B, L, K, H].
        cos, sin: [B or 1, L, H], with equal halves; the kernel computes no gradient for them.
        backend: "triton", "plain" or "auto". "auto" uses the kernel on a CUDA device if it can run.

    Returns:
        Query and key of the same shapes and types.

    Raises:
        ValueError: backend="triton", but the kernel cannot run.
    """
    if _on_kernels(backend, query, key, head_dim=query.shape[-1]):
        return rotary_kernel(query, key, cos, sin, False)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return rotate(query, cos, sin).to(query.dtype), rotate(key, cos, sin).to(key.dtype)


def silu_gate(gate: Tensor, up: Tensor, backend: Backend = "auto") -> Tensor:
    """silu(gate) * up, of equal shapes; `backend` and errors as in `rotary`."""
    if _on_kernels(backend, gate, up):
        return silu_gate_kernel(gate, up)
    return F.silu(gate) * up


def gelu_gate(both: Tensor, backend: Backend = "auto") -> Tensor:
    """u * gelu(g), with the exact GELU, for `both` [..., 2 * width] = (u, g); `backend` and errors as in `rotary`."""
    if _on_kernels(backend, both):
        return gelu_gate_kernel(both)
    up, gate = both.chunk(2, dim=-1)
    return up * F.gelu(gate)


# ----------------------------------------------------------------------------------------------------------------------
# The registered operators. Triton is imported at the first launch.


@custom_op("mm_interleaved::rotary", mutates_args=())
def rotary_kernel(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """The kernel; arguments as in `rotary`. `inverse` rotates backwards, as the gradients need it."""
    from .pointwise_triton import rotary as fused

    return fused(query, key, cos, sin, inverse)


@rotary_kernel.register_fake
def _(query, key, cos, sin, inverse):
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _keep_angles(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _turn_back(ctx, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
    return (*rotary_kernel(grad_query, grad_key, *ctx.saved_tensors, not ctx.inverse), None, None, None)


rotary_kernel.register_autograd(_turn_back, setup_context=_keep_angles)


@custom_op("mm_interleaved::silu_gate", mutates_args=())
def silu_gate_kernel(gate: Tensor, up: Tensor) -> Tensor:
    """The kernel; arguments as in `silu_gate`."""
    from .pointwise_triton import silu_gate as fused

    return fused(gate, up)


@silu_gate_kernel.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@custom_op("mm_interleaved::silu_gate_backward", mutates_args=())
def silu_gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to `gate` and `up`."""
    from .pointwise_triton import silu_gate_backward as fused

    return fused(grad, gate, up)


@silu_gate_backward.register_fake
def _(grad, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _keep_both(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gate_gradients(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    return silu_gate_backward(grad, *ctx.saved_tensors)


silu_gate_kernel.register_autograd(_gate_gradients, setup_context=_keep_both)


@custom_op("mm_interleaved::gelu_gate", mutates_args=())
def gelu_gate_kernel(both: Tensor) -> Tensor:
    """The kernel; arguments as in `gelu_gate`."""
    from .pointwise_triton import gelu_gate as fused

    return fused(both)


@gelu_gate_kernel.register_fake
def _(both):
    return both.new_empty((*both.shape[:-1], both.shape[-1] // 2))


@custom_op("mm_interleaved::gelu_gate_backward", mutates_args=())
def gelu_gate_backward(grad: Tensor, both: Tensor) -> Tensor:
    """Gradient to `both`."""
    from .pointwise_triton import gelu_gate_backward as fused

    return fused(grad, both)


@gelu_gate_backward.register_fake
def _(grad, both):
    return both.new_empty(both.shape)


def _keep_halves(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _halves_gradient(ctx, grad: Tensor) -> Tensor:
    return gelu_gate_backward(grad, *ctx.saved_tensors)


gelu_gate_kernel.register_autograd(_halves_gradient, setup_context=_keep_halves)
