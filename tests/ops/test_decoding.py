"""Kernels of decoding against their plain forms: on a CUDA device, else in Triton's interpreter at tiny sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mm_interleaved.ops import attend, project, project_gated, why_not_kernels
from mm_interleaved.ops.mmfs_attention import HAS_TRITON
from mm_interleaved.ops.scaled_rows import ScaledRows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [1, 3]
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny sizes take several programs, several pieces and ragged ends."""
    from mm_interleaved.ops import decoding_triton

    monkeypatch.setattr(
        decoding_triton, "TILE", dict.fromkeys(decoding_triton.TILE, (4, 16, 1)) | {"rows": (16, 16, 1)}
    )
    monkeypatch.setattr(decoding_triton, "COLUMNS", 16)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(found: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    found, expected = found.double(), expected.double()
    assert float((found - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("sizes", [(24, 8, 9), (21,), (16, 18)])
def test_project(rows: int, norm: bool, sizes: tuple[int, ...]) -> None:
    x, weights = draw(rows, 40), [draw(n, 40) for n in sizes]
    biases = [draw(n) if i % 2 == 0 else None for i, n in enumerate(sizes)]
    residual = draw(rows, sum(sizes))
    settings = {"gain": draw(40) if norm else None, "eps": 1e-6}
    for extra in ({}, {"biases": biases}, {"residual": residual}, {"biases": biases, "residual": residual}):
        found, expected = (project(x, weights, **settings, **extra, backend=b) for b in ("triton", "plain"))
        close(found, expected)


@pytest.mark.parametrize("rows", ROWS)
def test_project_gated(rows: int) -> None:
    x, gate, up, gain = draw(rows, 40), draw(26, 40), draw(26, 40), draw(40)
    close(*(project_gated(x, gate, up, gain=gain, eps=1e-6, backend=b) for b in ("triton", "plain")))


BYTES = [torch.int8, torch.float8_e4m3fn]


def scaled_rows(outputs: int, kind: torch.dtype, dtype: torch.dtype = torch.float32) -> ScaledRows:
    data = torch.randint(-127, 128, (outputs, 40)).float().to(kind)
    return ScaledRows(data.to(DEVICE), draw(outputs, dtype=dtype).abs())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", BYTES, ids=str)
@pytest.mark.parametrize("sizes", [(24, 8, 9), (21,)])
def test_weights_of_one_byte_with_scales(rows: int, kind: torch.dtype, sizes: tuple[int, ...]) -> None:
    x, weights, biases = draw(rows, 40), [scaled_rows(n, kind) for n in sizes], [draw(n) for n in sizes]
    settings = {"gain": draw(40), "eps": 1e-6, "biases": biases, "residual": draw(rows, sum(sizes))}
    found, expected = (project(x, weights, **settings, backend=b) for b in ("triton", "plain"))
    close(found, expected)
    close(expected, project(x, [w.widened(torch.float32) for w in weights], **settings), 1e-6)
    gate, up = scaled_rows(26, kind), scaled_rows(26, kind)
    close(*(project_gated(x, gate, up, gain=draw(40).fill_(0.01), eps=1e-6, backend=b) for b in ("triton", "plain")))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", BYTES, ids=str)
def test_weights_of_one_byte_in_half_precision(rows: int, kind: torch.dtype) -> None:
    x, weight = draw(rows, 40, dtype=torch.float16), scaled_rows(24, kind, torch.float16)
    exact = project(x.float(), [weight.widened(torch.float32)])
    found = project(x, [weight], backend="triton")
    assert found.dtype == torch.float16
    close(found.float(), exact, 3 * torch.finfo(torch.float16).eps)


def test_a_slice_is_read_where_it_lies() -> None:
    whole = draw(3, 64)
    weight = draw(8, 40)
    close(*(project(whole[:, 8:48], [weight], backend=b) for b in ("triton", "plain")))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("column", "heads", "key_heads", "dim"), [(0, 2, 2, 16), (17, 4, 2, 8), (31, 4, 1, 16)])
@pytest.mark.parametrize("shared", [False, True])
def test_attend(rows: int, column: int, heads: int, key_heads: int, dim: int, shared: bool) -> None:
    """Rows of different lengths, beams that share columns, and nothing after the new token counts or changes."""
    both = draw(rows, (heads + 2 * key_heads) * dim)
    query, key, value = both.split([heads * dim, key_heads * dim, key_heads * dim], dim=-1)
    cos, sin = draw(rows, dim), draw(rows, dim)
    keys, values = (draw(rows, key_heads, 48, dim) for _ in range(2))
    own = torch.arange(rows, device=DEVICE)
    at = torch.full_like(own, column) if shared else (column - 3 * own).clamp(min=0)  # beams are of one length
    source = torch.randint(0, rows, (rows, 48)).to(DEVICE) if shared else None
    if source is not None:
        source[own, at] = own
    results = []
    for backend in ("triton", "plain"):
        kept = keys.clone(), values.clone()
        mixed = attend(query, key, value, cos, sin, *kept, at, dim**-0.5, source, backend=backend)
        results.append((mixed, *kept))
    for found, expected in zip(*results, strict=True):
        close(found, expected)
    changed = (results[0][1] != keys).any(-1).any(1)  # [rows, columns]
    assert torch.equal(changed.nonzero(), torch.stack([own, at], dim=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
def test_half_precision(rows: int, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and rows > 1 and dtype == torch.bfloat16:
        pytest.skip("the interpreter's matrix product does not know bfloat16")
    x, weight, gain, residual = (draw(*s, dtype=dtype) for s in ((rows, 64), (32, 64), (64,), (rows, 32)))
    found = project(x, [weight], gain=gain, eps=1e-6, residual=residual, backend="triton")
    exact = project(*(t.float() for t in (x,)), [weight.float()], gain=gain.float(), eps=1e-6,
                    residual=residual.float())  # fmt: skip
    close(found.float(), exact, 3 * torch.finfo(dtype).eps)


def test_reasons() -> None:
    assert why_not_kernels(draw(1, 8), 128) is None
    assert "float64" in why_not_kernels(draw(1, 8).double(), 128)
    assert "513" in why_not_kernels(draw(1, 8), 513)
