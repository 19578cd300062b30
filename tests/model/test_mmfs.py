"""MMFS: the fast form against the published one (docs/model.md, "MMFS")."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm_interleaved.model.config import MMFSConfig
from mm_interleaved.model.mmfs import MMFS, VisibleImages, mmfs_reference
from mm_interleaved.ops import softmax_plus_one

from ..conftest import awaken, visible_in_mask

CONFIG = MMFSConfig(hidden_size=8, levels=[4, 2], num_heads=2, num_points=3, max_images=6, base_size=2)
SHAPES = [(4, 4), (2, 2)]
CENTRE = torch.full((1, 1, 2), 0.5, dtype=torch.float64)


def module(seed: int = 0, dtype: torch.dtype = torch.float64) -> MMFS:
    torch.manual_seed(seed)
    return awaken(MMFS(CONFIG, query_size=10, feature_size=6), seed).to(dtype)


def run(mmfs: MMFS, query: Tensor, features: Tensor, mask: Tensor, form: str, shapes: list = SHAPES) -> Tensor:
    """`query` [batch, length, width], `features` [batch, n, positions, width], `mask` [batch, (length or other), n]."""
    batch, length, width = query.shape
    centre = CENTRE.to(query.dtype)
    if form == "reference":
        return mmfs_reference(mmfs, query, mmfs.project(features), mask, shapes, centre, 2)[0]
    dense = mask[:, None].expand(-1, length, -1) if mask.dim() == 2 else mask
    dense = dense if dense.shape[1] == length else dense[:, -1:].expand(-1, length, -1)
    visible = visible_in_mask(dense)
    flat = features.flatten(0, 1)
    derived = mmfs.derive_query() if form == "derived" else None
    assert (derived is None) == (form != "derived")
    given = mmfs.project(flat), visible, shapes, centre, 2, derived
    return mmfs(query.reshape(-1, 1, width), *given).view(batch, length, -1)


def data(batch: int, length: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, length, 10, generator=generator, dtype=torch.float64)
    features = torch.randn(batch, n, 20, 6, generator=generator, dtype=torch.float64)
    return query.to(dtype), features.to(dtype)


@settings(max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.sampled_from(["3d", "2d", "last"]),
)
def test_fast_forms_equal_the_published_one(batch: int, length: int, n: int, seed: int, kind: str) -> None:
    """Any mask, among them all-masked rows; 1e-12 in float64."""
    query, features = data(batch, length, n, seed)
    generator = torch.Generator().manual_seed(seed)
    shape = {"3d": (batch, length, n), "2d": (batch, n), "last": (batch, length + 2, n)}[kind]
    mask = torch.randint(0, 2, shape, generator=generator)
    mmfs = module(seed % 7)
    plain = run(mmfs, query, features, mask.double() if kind != "2d" else mask, "reference")
    for form in ("fast", "derived"):
        torch.testing.assert_close(run(mmfs, query, features, mask, form), plain, rtol=0, atol=1e-12)


def test_maps_of_other_sizes_than_the_nominal_ones() -> None:
    """Then locations differ between levels; non-square maps catch swapped axes."""
    shapes = [(5, 3), (2, 4)]
    query, _ = data(2, 3, 2)
    features = torch.randn(2, 2, 23, 6, dtype=torch.float64)
    mask = torch.ones(2, 3, 2)
    mmfs = module()
    plain = run(mmfs, query, features, mask.double(), "reference", shapes)
    torch.testing.assert_close(run(mmfs, query, features, mask, "fast", shapes), plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("form", ["reference", "fast", "derived"])
def test_half_precision_of_every_form(form: str, dtype: torch.dtype, bound: float) -> None:
    """Relative error against float64 with the same rounded weights and input: about four roundings."""
    query, features = data(2, 3, 3, dtype=dtype)
    mask = torch.tensor([[[1, 1, 0], [0, 1, 1], [1, 1, 1]], [[0, 0, 0], [1, 0, 1], [0, 0, 1]]])
    mmfs = module(dtype=dtype)
    out = run(mmfs, query, features, mask.to(dtype), form)
    assert out.dtype == dtype
    exact = run(mmfs.double(), query.double(), features.double(), mask.double(), "reference")
    assert (out.double() - exact).norm() / exact.norm() < bound


def test_gradients_of_both_forms_agree_and_dead_rows_get_none() -> None:
    """The learned ignore logits and row 0 of the recency table never matter."""
    query, features = data(2, 3, 3)
    mask = torch.tensor([[[1, 1, 0], [0, 1, 1], [1, 1, 1]], [[0, 0, 0], [1, 0, 1], [0, 0, 1]]])
    gradients = []
    for form in ("reference", "fast"):
        mmfs = module()
        x, f = query.clone().requires_grad_(), features.clone().requires_grad_()
        run(mmfs, x, f, mask.double(), form).square().sum().backward()
        gradients.append({"query": x.grad, "features": f.grad} | {k: p.grad for k, p in mmfs.named_parameters()})
        dead = mmfs.attention_weights.weight.grad.unflatten(0, (-1, CONFIG.num_points + 1))[:, -1]
        assert not dead.any()
        assert not mmfs.query_relpos.weight.grad[0].any()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-11, msg=name)


def test_gradcheck_of_all_parameters() -> None:
    mmfs = module(1)
    query, features = data(1, 2, 2, seed=5)
    mask = torch.tensor([[[1, 0], [1, 1]]])
    names = [n for n, _ in mmfs.named_parameters()]

    def function(*values: Tensor) -> Tensor:
        parameters = dict(zip(names, values[2:], strict=True))
        visible, flat = visible_in_mask(mask), values[1].flatten(0, 1)

        def call(module_: MMFS) -> Tensor:
            return module_(values[0].reshape(-1, 1, 10), module_.project(flat), visible, SHAPES, CENTRE, 2)

        return torch.func.functional_call(_Caller(mmfs, call), {f"mmfs.{k}": v for k, v in parameters.items()}, ())

    leaves = [x.detach().clone().requires_grad_() for x in (query, features, *mmfs.parameters())]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-7, atol=1e-5)


class _Caller(torch.nn.Module):
    """Lets functional_call reach a module through a method."""

    def __init__(self, mmfs: MMFS, call) -> None:
        super().__init__()
        self.mmfs, self.call = mmfs, call

    def forward(self) -> Tensor:
        return self.call(self.mmfs)


def test_a_query_that_sees_nothing_gets_a_constant() -> None:
    """Not zero, but W_out ignore_token + b_out."""
    mmfs = module()
    query, features = data(2, 2, 3)
    constant = mmfs.output_proj(mmfs.ignore_token.view(-1))
    for form in ("reference", "fast", "derived"):
        out = run(mmfs, query, features, torch.zeros(2, 2, 3).double(), form)
        torch.testing.assert_close(out, constant.expand(2, 2, -1), rtol=0, atol=1e-12)


def test_invisible_images_change_nothing() -> None:
    mmfs = module()
    query, features = data(1, 2, 2)
    more = torch.cat([features, 1e3 * torch.randn(1, 2, 20, 6, dtype=torch.float64)], dim=1)
    mask = torch.tensor([[[1, 0], [1, 1]]])
    for form in ("reference", "fast"):
        few = run(mmfs, query, features, mask.double(), form)
        many = run(mmfs, query, more, torch.cat([mask, torch.zeros_like(mask)], -1).double(), form)
        torch.testing.assert_close(many, few, rtol=0, atol=1e-12)


def test_order_of_images_matters_by_recency_alone() -> None:
    """Hidden images between visible ones do not count: r is 1 for the most recent visible one."""
    mmfs = module()
    query, features = data(1, 1, 3)
    between = run(mmfs, query, features, torch.tensor([[[1, 0, 1]]]).double(), "fast")
    without = run(mmfs, query, features[:, [0, 2]], torch.tensor([[[1, 1]]]).double(), "fast")
    torch.testing.assert_close(between, without, rtol=0, atol=1e-13)
    swapped = run(mmfs, query, features[:, [2, 0]], torch.tensor([[[1, 1]]]).double(), "fast")
    assert not torch.allclose(swapped, without)


def test_groups_of_queries_share_their_images() -> None:
    """The UNet's use: many queries a group, each with its own reference point."""
    mmfs = module()
    query, features = data(2, 5, 2)
    points = torch.rand(1, 5, 2, dtype=torch.float64)
    mask = torch.tensor([[1, 0], [1, 1]])
    visible = VisibleImages.build(torch.tensor([[0, -1], [3, 2]]), 4)
    grouped = mmfs(query, mmfs.project(features.flatten(0, 1)), visible, SHAPES, points, 2)
    plain, _, _ = mmfs_reference(mmfs, query, mmfs.project(features), mask, SHAPES, points, 2)
    torch.testing.assert_close(grouped, plain, rtol=0, atol=1e-12)


def test_switch_to_the_reference() -> None:
    mmfs = module()
    query, features = data(2, 3, 3)
    mask = torch.tensor([[[1, 1, 0], [0, 0, 0], [1, 1, 1]], [[0, 1, 1], [1, 0, 0], [0, 0, 1]]])
    fast = run(mmfs, query, features, mask, "fast")
    mmfs.implementation = "reference"
    torch.testing.assert_close(run(mmfs, query, features, mask, "fast"), fast, rtol=0, atol=1e-12)


def test_float32_is_tight() -> None:
    mmfs, exact = module(dtype=torch.float32), module()
    query, features = data(2, 4, 3, dtype=torch.float32)
    mask = torch.ones(2, 4, 3)
    out = run(mmfs, query, features, mask, "fast").double()
    expected = run(exact, query.double(), features.double(), mask, "fast")
    assert (out - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["fast", "derived"])
def test_half_precision_bound(dtype: torch.dtype, form: str) -> None:
    """Inputs and weights rounded to `dtype` differ by eps / 2 each; a chain of five products stays within 8 eps."""
    mmfs, exact = module(dtype=dtype), module()
    exact.load_state_dict({k: v.double() for k, v in mmfs.state_dict().items()})
    query, features = data(2, 4, 3, dtype=dtype)
    mask = torch.ones(2, 4, 3)
    out = run(mmfs, query, features, mask, form).double()
    expected = run(exact, query.double(), features.double(), mask, form)
    assert out.isfinite().all()
    assert (out - expected).norm() / expected.norm() < 8 * torch.finfo(dtype).eps


def test_extreme_logits_stay_finite() -> None:
    mmfs = module()
    query, features = data(1, 2, 2)
    with torch.no_grad():
        mmfs.attention_weights.bias.copy_(torch.linspace(-1e4, 1e4, len(mmfs.attention_weights.bias)))
    out = run(mmfs, query, features, torch.ones(1, 2, 2), "fast")
    assert out.isfinite().all()


def test_softmax_plus_one() -> None:
    logits = torch.randn(2, 1, 3, 2, 2, 2, dtype=torch.float64)
    weights, extra = softmax_plus_one(logits)
    total = 1 + logits.exp().flatten(-3).sum(-1)
    torch.testing.assert_close(extra, 1 / total)
    torch.testing.assert_close(weights, logits.exp() / total[..., None, None, None])


def test_more_images_than_the_table_tells_apart() -> None:
    query, features = data(1, 1, 6)
    with pytest.raises(ValueError, match="6 images are visible at once, but this model distinguishes at most 5"):
        run(module(), query, features, torch.ones(1, 1, 6), "fast")


def test_routes_name_every_entry_once() -> None:
    images = torch.tensor([[2, 0], [-1, -1], [2, -1]])
    visible = VisibleImages.build(images, 4)
    assert visible.routes.tolist() == [[1, -1], [-1, -1], [0, 4], [-1, -1]]
    assert visible.mask(4).tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
