"""Rotary positions and gates: the kernels, interpreted or on a GPU, against PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mm_interleaved.ops import gelu_gate, rotary, silu_gate
from mm_interleaved.ops.mmfs_attention import HAS_TRITON
from mm_interleaved.ops.pointwise import gelu_gate_kernel, rotary_kernel, silu_gate_kernel, why_not_pointwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # one rounding
SHAPES = [(2, 5, 4, 4, 16), (1, 3, 6, 2, 10), (3, 1, 1, 1, 128), (1, 7, 40, 8, 64)]


def turning(batch: int, length: int, heads: int, key_heads: int, dim: int, rows: int | None = None) -> list[Tensor]:
    """Query, key, cos and sin in float64."""
    angles = 3 * torch.randn(rows or batch, length, dim // 2, dtype=torch.float64)
    both = torch.cat([angles, angles], dim=-1)
    draw = [torch.randn(batch, length, n, dim, dtype=torch.float64) for n in (heads, key_heads)]
    return [*draw, both.cos(), both.sin()]


def gates(*shape: int) -> list[Tensor]:
    return [4 * torch.randn(*shape, dtype=torch.float64) for _ in range(2)]


def halves(*shape: int) -> list[Tensor]:
    return [4 * torch.randn(*shape, dtype=torch.float64)]


def run(call: Callable[..., object], given: list[Tensor], kind: torch.dtype, backend: str) -> list[Tensor]:
    """Results, and gradients of the first inputs."""
    leaves = [x.to(DEVICE, kind, copy=True).requires_grad_(i < 2) for i, x in enumerate(given)]
    found = call(*leaves, backend)
    found = [found] if isinstance(found, Tensor) else list(found)
    weights = [torch.linspace(-1, 1, x.numel(), device=DEVICE, dtype=torch.float64).view_as(x) for x in found]
    sum((x.double() * w).sum() for x, w in zip(found, weights, strict=True)).backward()
    return [*(x.detach() for x in found), *(x.grad for x in leaves[:2])]


CASES = [*((rotary, turning(*shape)) for shape in SHAPES), (rotary, turning(3, 4, 2, 1, 8, rows=1)),
         (silu_gate, gates(3, 5, 7)), (gelu_gate, halves(3, 5, 14)), (gelu_gate, halves(2, 600)),
         (silu_gate, gates(2, 1024))]  # fmt: skip


@with_triton
@pytest.mark.parametrize(("call", "given"), CASES)
def test_results_and_gradients_are_the_operators(call: Callable[..., object], given: list[Tensor]) -> None:
    exact = run(call, given, torch.float64, "plain")
    for plain, kernel, truth in zip(
        run(call, given, torch.float32, "plain"), run(call, given, torch.float32, "triton"), exact, strict=True
    ):
        assert kernel.shape == plain.shape
        assert float((kernel.double() - truth).norm() / truth.norm()) < 1e-6
        torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-5)


@with_triton
@pytest.mark.parametrize("kind", list(HALF), ids=str)
@pytest.mark.parametrize(("call", "given"), [CASES[0], CASES[-2], CASES[-1]], ids=["rotary", "gelu", "silu"])
def test_half_precision_is_rounded_once(call: Callable[..., object], given: list[Tensor], kind: torch.dtype) -> None:
    given = [x.to(kind).double() for x in given]
    exact = run(call, given, torch.float64, "plain")
    for plain, kernel, truth in zip(
        run(call, given, kind, "plain"), run(call, given, kind, "triton"), exact, strict=True
    ):
        assert kernel.dtype == kind
        error, theirs = (float((x.double() - truth).norm() / truth.norm()) for x in (kernel, plain))
        cut_off = DEVICE == "cpu" and kind == torch.bfloat16  # so Triton's interpreter rounds
        assert error < (2 * HALF[kind] if cut_off else min(HALF[kind], 1.05 * theirs))


@with_triton
def test_strided_inputs() -> None:
    query, key, cos, sin = (x.to(DEVICE, torch.float32) for x in turning(2, 6, 4, 2, 8))
    wide = torch.cat([query, query], dim=-1)[..., :8]
    heads_first = key.transpose(1, 2).contiguous().transpose(1, 2)
    every_second = torch.stack([cos, cos], dim=-1)[..., 0]
    found = rotary(wide, heads_first, every_second, sin, "triton")
    for a, b in zip(found, rotary(query, key, cos, sin, "plain"), strict=True):
        torch.testing.assert_close(a, b)


def test_the_plain_form_is_the_librarys() -> None:
    query, key, cos, sin = (x.float() for x in turning(2, 5, 4, 2, 16))
    theirs = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    for a, b in zip(rotary(query, key, cos, sin), theirs, strict=True):
        assert torch.equal(a, b.transpose(1, 2))


@with_triton
def test_types_that_differ() -> None:
    """Under autocast products are half, angles float32: the result has the type of what is turned."""
    query, key, cos, sin = (x.to(DEVICE, torch.float32) for x in turning(1, 5, 2, 2, 8))
    query, key = query.bfloat16(), key.bfloat16()
    for a, b in zip(*(rotary(query, key, cos, sin, how) for how in ("plain", "triton")), strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b)


@with_triton
def test_the_registered_operators_keep_pytorchs_rules() -> None:
    query, key, cos, sin = (x.to(DEVICE, torch.float32) for x in turning(1, 2, 2, 1, 4))
    gate, up = (x.to(DEVICE, torch.float32).requires_grad_() for x in gates(2, 3))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(rotary_kernel, (query.requires_grad_(), key.requires_grad_(), cos, sin, False),
                          test_utils=tests)  # fmt: skip
    torch.library.opcheck(silu_gate_kernel, (gate, up), test_utils=tests)
    both = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    torch.library.opcheck(gelu_gate_kernel, (both,), test_utils=tests)


@with_triton
def test_nothing_is_nothing() -> None:
    empty = torch.zeros(0, 3, 2, 4, device=DEVICE)
    assert rotary(empty, empty, empty[..., 0, :], empty[..., 0, :], "triton")[0].shape == empty.shape
    assert silu_gate(empty, empty, "triton").shape == empty.shape
    assert gelu_gate(empty, "triton").shape == (0, 3, 2, 2)


@with_triton
def test_large_gates_are_finite() -> None:
    both = torch.tensor([[1.0, 2.0, 1e4, -1e4]], device=DEVICE, requires_grad=True)
    gelu_gate(both, "triton").sum().backward()
    torch.testing.assert_close(both.grad, torch.tensor([[1e4, 0.0, 1.0, 0.0]], device=DEVICE))


def test_errors_say_why() -> None:
    x = torch.zeros(1, 1, 1, 6, dtype=torch.float64, device=DEVICE)
    assert "float64" in why_not_pointwise(x) or not HAS_TRITON
    with pytest.raises(ValueError, match="cannot run through Triton"):
        rotary(x, x, x[:, :, 0], x[:, :, 0], "triton")
    if HAS_TRITON and DEVICE == "cpu":
        assert "even numbers" in why_not_pointwise(x.float(), head_dim=7)
        assert "one at a time" in why_not_pointwise(x.float(), x.half())
