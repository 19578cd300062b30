"""Deformable attention against its plain reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mm_interleaved.ops import deformable_attention, deformable_attention_reference


def inputs(shapes: list[tuple[int, int]], seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 1.4,
           dim: int = 4, queries: int = 3):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    batch, heads, points = 2, 2, 3

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    value = draw(batch, sum(h * w for h, w in shapes), heads, dim)
    locations = 0.5 + spread * (torch.rand(batch, queries, heads, len(shapes), points, 2, generator=generator) - 0.5)
    return value, shapes, locations.to(dtype), draw(batch, queries, heads, len(shapes), points)


SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3)


@given(SHAPES, st.integers(0, 1000), st.sampled_from([0.5, 1.4, 50.0]))
def test_agrees_with_the_reference(shapes: list[tuple[int, int]], seed: int, spread: float) -> None:
    """Far outside locations included."""
    arguments = inputs(shapes, seed, spread=spread)
    torch.testing.assert_close(
        deformable_attention(*arguments), deformable_attention_reference(*arguments), rtol=1e-10, atol=1e-12
    )


@given(SHAPES, st.integers(0, 1000), st.sampled_from([0.5, 1.4, 50.0, 1e30]), st.sampled_from([3, 530]))
def test_sums_of_rows_agree_with_the_reference(
    shapes: list[tuple[int, int]], seed: int, spread: float, queries: int
) -> None:
    """Long enough rows in float32 without gradients, as a CPU has them when it generates; more than a block of them."""
    arguments = inputs(shapes, seed, torch.float32, spread, dim=16, queries=queries)
    exact = inputs(shapes, seed, torch.float64, spread, dim=16, queries=queries)
    exact = (exact[0], shapes, arguments[2].double(), exact[3])
    found = deformable_attention(*arguments)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), deformable_attention_reference(*exact), rtol=1e-5, atol=5e-5)
    learned = [arguments[0].requires_grad_(), *arguments[1:]]  # with gradients maps are sampled
    torch.testing.assert_close(deformable_attention(*learned), found, rtol=1e-5, atol=5e-5)


def test_places_that_are_no_numbers_spoil_their_own_query_only() -> None:
    value, shapes, locations, weights = inputs([(4, 4), (2, 3)], dtype=torch.float32, dim=16)
    right = deformable_attention(value, shapes, locations, weights)
    for wrong in (float("nan"), float("inf")):
        locations[1, 2, 1, 0, 0, 0] = wrong
        found = deformable_attention(value, shapes, locations, weights).view(2, 3, 2, 16)
        assert found[1, 2, 1].isnan().all() == (wrong != wrong)
        found[1, 2, 1] = right.view(2, 3, 2, 16)[1, 2, 1]
        torch.testing.assert_close(found.flatten(2), right)


def test_gradients_agree_with_the_reference() -> None:
    value, shapes, locations, weights = inputs([(4, 5), (2, 3)])
    gradients = []
    for form in (deformable_attention, deformable_attention_reference):
        leaves = [x.clone().requires_grad_() for x in (value, locations, weights)]
        form(leaves[0], shapes, leaves[1], leaves[2]).square().sum().backward()
        gradients.append([x.grad for x in leaves])
    for fast, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-10)


def test_gradcheck_of_the_reference() -> None:
    value, shapes, locations, weights = inputs([(3, 4), (2, 2)], seed=3)
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    assert torch.autograd.gradcheck(
        lambda v, x, w: deformable_attention_reference(v, shapes, x, w), leaves, eps=1e-7, atol=1e-5
    )


def test_levels_can_share_their_locations() -> None:
    value, shapes, locations, weights = inputs([(4, 4), (2, 2)])
    shared = locations[:, :, :, :1]
    torch.testing.assert_close(
        deformable_attention(value, shapes, shared, weights),
        deformable_attention(value, shapes, shared.expand(-1, -1, -1, 2, -1, -1), weights),
    )


def test_the_centre_of_a_pixel_is_that_pixel() -> None:
    value = torch.arange(6.0).view(1, 6, 1, 1)  # 2 x 3
    location = torch.tensor([(1 + 0.5) / 3, (1 + 0.5) / 2]).view(1, 1, 1, 1, 1, 2)
    weight = torch.ones(1, 1, 1, 1, 1)
    for form in (deformable_attention, deformable_attention_reference):
        assert form(value, [(2, 3)], location, weight).item() == pytest.approx(4.0)


def test_outside_is_zero() -> None:
    value, shapes, locations, weights = inputs([(3, 3)])
    for form in (deformable_attention, deformable_attention_reference):
        assert not form(value, shapes, locations + 9, weights).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    """The only error is the rounding of inputs' values and of the result: half a unit in the last place."""
    value, shapes, locations, weights = inputs([(4, 5), (2, 2)], dtype=torch.float32)
    value = value.to(dtype)
    out = deformable_attention(value, shapes, locations, weights)
    exact = deformable_attention(value.double(), shapes, locations.double(), weights.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_non_contiguous_inputs() -> None:
    value, shapes, locations, weights = inputs([(3, 4)])
    strided = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(
        deformable_attention(strided, shapes, locations, weights),
        deformable_attention(value, shapes, locations, weights),
    )
