"""Deformable attention around fixed points: the kernels, interpreted or on a GPU, against the composition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mm_interleaved.model import MMInterleavedConfig
from mm_interleaved.model.vit_adapter import DeformableAttention, cell_centres
from mm_interleaved.ops import deformable_attention_around
from mm_interleaved.ops.mmfs_attention import HAS_TRITON

from .mmfs_inputs import relative

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
THREE = [(4, 4), (2, 2), (1, 1)]
TWO = [(4, 4), (2, 2)]


def inputs(shapes: list[tuple[int, int]], spread: float = 2.0, sharp: float = 1.0, points: int = 4) -> list[Tensor]:
    """Value, offsets, logits and reference in float64."""
    generator = torch.Generator().manual_seed(len(shapes))
    batch, queries, heads, dim = 2, 3, 2, 8

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layout = (batch, queries, heads, len(shapes), points)
    value = draw(batch, sum(h * w for h, w in shapes), heads, dim)
    return [
        value,
        spread * draw(*layout, 2),
        sharp * draw(*layout),
        torch.rand(queries, 2, generator=generator).double(),
    ]


def run(
    given: list[Tensor], shapes: list[tuple[int, int]], backend: str, kind: torch.dtype = torch.float32
) -> list[Tensor]:
    """The result and the gradients of value, offsets and logits."""
    value, offsets, logits = (x.to(DEVICE, kind, copy=True).requires_grad_() for x in given[:3])
    found = deformable_attention_around(value, shapes, offsets, logits, given[3].to(DEVICE, kind), backend)
    weights = torch.linspace(-1, 1, found.numel(), device=DEVICE, dtype=kind).view_as(found)
    (found * weights).sum().backward()
    return [found.detach(), value.grad, offsets.grad, logits.grad]


@with_triton
@pytest.mark.parametrize(
    ("shapes", "spread", "sharp", "points"),
    [
        (THREE, 2.0, 1.0, 4), ([(5, 5)], 2.0, 1.0, 4), ([(3, 5), (6, 2)], 1.0, 3.0, 3),
        (TWO, 100.0, 1.0, 2), (TWO, 2.0, 40.0, 2), (TWO, 2.0, 1e4, 1),
    ],
    ids=["three levels", "one level", "oblong maps", "far outside", "one sample counts", "extreme logits"],
)  # fmt: skip
def test_results_and_gradients_are_the_compositions(
    shapes: list[tuple[int, int]], spread: float, sharp: float, points: int
) -> None:
    given = inputs(shapes, spread, sharp, points)
    exact = run(given, shapes, "plain", torch.float64)
    for name, plain, kernels, truth in zip(
        ("result", "value", "offsets", "logits"), run(given, shapes, "plain"), run(given, shapes, "triton"), exact,
        strict=True,
    ):  # fmt: skip
        assert kernels.shape == plain.shape
        assert torch.isfinite(kernels).all(), name
        error, allowed = ((x.double() - truth).norm() for x in (kernels, plain))
        assert error < max(2e-5 * float(truth.norm()), 4 * float(allowed), 1e-6), (name, error, allowed)


@with_triton
def test_half_precision_is_as_exact_as_its_rounding() -> None:
    value, offsets, logits, reference = (x.to(DEVICE, torch.float32) for x in inputs(THREE))
    exact = deformable_attention_around(value.bfloat16().float(), THREE, offsets, logits, reference, "plain")
    found = deformable_attention_around(value.bfloat16(), THREE, offsets, logits, reference, "triton")
    assert found.dtype == torch.bfloat16
    assert relative(found.float(), exact) < 2**-8


@with_triton
def test_the_adapters_attention_gives_the_same() -> None:
    torch.manual_seed(0)
    attention = DeformableAttention(16, MMInterleavedConfig.preset("debug").adapter, levels=2).to(DEVICE)
    query, features = torch.randn(1, 4, 16, device=DEVICE), torch.randn(1, 20, 16, device=DEVICE)
    reference = cell_centres([2], query.device)
    found = []
    for backend in ("plain", "triton"):
        attention.backend = backend
        found.append(attention(query, reference, features, [(4, 4), (2, 2)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_without_a_device_for_them_the_composition_runs() -> None:
    given = [x.float() for x in inputs(THREE)]
    plain = deformable_attention_around(given[0], THREE, *given[1:], "plain")
    assert torch.equal(deformable_attention_around(given[0], THREE, *given[1:], "auto"), plain)
