"""Group norm with and without SiLU: the kernels, interpreted or on a GPU, against PyTorch's own operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_interleaved.ops import GroupNorm, channels_last, why_not_group_norm
from mm_interleaved.ops.group_norm import group_norm
from mm_interleaved.ops.mmfs_attention import HAS_TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # one rounding
# One tile, half of it; several parts of an image; odd groups; more channels than a block; no map but a row of tokens.
SHAPES = [((2, 4, 5, 3), 2), ((1, 8, 24, 24), 4), ((2, 21, 3, 4), 7), ((3, 80, 9, 7), 8), ((2, 320, 4, 4), 32),
          ((1, 12, 9), 3), ((2, 6, 1, 1), 2), ((2, 5, 4, 4), 1)]  # fmt: skip


def last(x: Tensor) -> Tensor:
    """The same map with its channels last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def drawn(shape: tuple[int, ...]) -> list[Tensor]:
    """A map, gain and bias in float64."""
    x, gain, bias = (torch.randn(size, dtype=torch.float64) for size in (shape, shape[1], shape[1]))
    return [2 * x + 0.5, 1 + 0.3 * gain, bias]


def run(
    given: list[Tensor], groups: int, kind: torch.dtype, backend: str, silu: bool, of_weights: torch.dtype | None = None
) -> list[Tensor]:
    """The result, and gradients to the map, gain and bias."""
    kinds = (kind, of_weights or kind, of_weights or kind)
    x, *weights = (g.to(DEVICE, k, copy=True) for g, k in zip(given, kinds, strict=True))
    leaves = [leaf.requires_grad_() for leaf in (last(x), *weights)]
    y = group_norm(leaves[0], groups, *leaves[1:], 1e-5, silu, backend)
    weight = torch.linspace(-1, 1, y.numel(), device=DEVICE, dtype=torch.float64).sin().view_as(y)
    (y.double() * weight).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def far(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-9))


@with_triton
@pytest.mark.parametrize("silu", [False, True], ids=["alone", "silu"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_results_and_gradients_are_the_operators(shape: tuple[int, ...], groups: int, silu: bool) -> None:
    given = drawn(shape)
    exact = run(given, groups, torch.float64, "plain", silu)
    kernel = run(given, groups, torch.float32, "triton", silu)
    for found, truth in zip(kernel, exact, strict=True):
        assert found.shape == truth.shape
        assert far(found, truth) < 1e-6
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    assert kernel[0].movedim(1, -1).is_contiguous()


@with_triton
def test_many_programs_that_take_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of several tiles, the last of them shorter, and more parts than are joined at a time."""
    from mm_interleaved.ops import group_norm_triton as kernels

    given = drawn((2, 16, 50, 41))
    exact = run(given, 4, torch.float64, "plain", True)
    for most, joined in ((6, 8), (64, 8), (10**6, 2048)):
        monkeypatch.setattr(kernels, "PROGRAMS", most)
        monkeypatch.setattr(kernels, "JOINED", joined)
        for found, truth in zip(run(given, 4, torch.float32, "triton", True), exact, strict=True):
            assert far(found, truth) < 1e-6


@with_triton
@pytest.mark.parametrize("kind", list(HALF), ids=str)
def test_half_precision_is_rounded_once(kind: torch.dtype) -> None:
    given = [x.to(kind).double() for x in drawn((2, 24, 9, 9))]
    exact = run(given, 3, torch.float64, "plain", True)
    cut_off = DEVICE == "cpu" and kind == torch.bfloat16  # so Triton's interpreter rounds
    for found, truth in zip(run(given, 3, kind, "triton", True), exact, strict=True):
        assert found.dtype == kind
        assert far(found, truth) < (2 if cut_off else 1) * HALF[kind]


@with_triton
def test_weights_of_another_type_than_the_map() -> None:
    """As under autocast, where PyTorch computes and returns float32: the kernels give what the rounding of that is."""
    given = drawn((2, 8, 6, 6))
    given[0] = given[0].bfloat16().double()
    exact = run(given, 4, torch.float64, "plain", True)
    found = run(given, 4, torch.bfloat16, "triton", True, of_weights=torch.float32)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for x, truth in zip(found, exact, strict=True):
        assert far(x, truth) < 2 * HALF[torch.bfloat16]
    assert max(far(x, truth) for x, truth in zip(found[2:], exact[2:], strict=True)) < 1e-2  # a gradient was rounded


@with_triton
@pytest.mark.parametrize(("offset", "deviation"), [(1e3, 1.0), (1e3, 0.05), (-1e5, 10.0)])
def test_a_large_mean_does_not_drown_the_variance(offset: float, deviation: float) -> None:
    x = (offset + deviation * torch.randn(2, 8, 40, 40, dtype=torch.float64)).float().to(DEVICE)
    x[0, :, 0, 0] += 30 * deviation  # the first pixel is nowhere near the mean
    gain, bias = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    found, truth = group_norm(last(x), 2, gain, bias, 1e-5, backend="triton"), F.group_norm(x.double(), 2)
    assert float((found.double() - truth).abs().max()) < 2 * abs(offset) * 2**-24 / deviation + 1e-5


@with_triton
def test_frozen_weights_get_no_gradient() -> None:
    x, gain, bias = (leaf.to(DEVICE, torch.float32) for leaf in drawn((2, 8, 4, 4)))
    x = last(x).requires_grad_()
    group_norm(x, 4, gain, bias, silu=True, backend="triton").square().sum().backward()
    assert gain.grad is None
    ours, x.grad = x.grad, None
    group_norm(x, 4, gain, bias, silu=True, backend="plain").square().sum().backward()
    torch.testing.assert_close(ours, x.grad, rtol=1e-4, atol=1e-4)


@with_triton
def test_maps_that_lie_otherwise() -> None:
    """Channels first, and a slice of a wider map, as the gradient of joined maps is."""
    x, gain, bias = (leaf.to(DEVICE, torch.float32) for leaf in drawn((2, 8, 4, 4)))
    expected = F.group_norm(x, 4, gain, bias)
    wide = torch.cat([last(x), last(x)], dim=1)[:, 8:]
    for given in (x, wide):
        found = group_norm(given, 4, gain, bias, backend="triton")
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)


@with_triton
def test_the_same_twice() -> None:
    given = drawn((2, 16, 24, 24))
    for a, b in zip(*(run(given, 4, torch.float32, "triton", True) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_gradients_of_the_plain_form() -> None:
    leaves = [x.requires_grad_() for x in drawn((2, 4, 3, 2))]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, 2, w, b, silu=True), leaves)


@with_triton
def test_computed_anew_in_the_backward_pass() -> None:
    x, gain, bias = (leaf.to(DEVICE, torch.float32).requires_grad_() for leaf in drawn((1, 4, 3, 3)))

    def layer(x: Tensor) -> Tensor:
        return group_norm(x, 2, gain, bias, silu=True, backend="triton").square()

    kept = torch.autograd.grad(layer(x).sum(), (x, gain, bias))
    anew = torch.autograd.grad(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum(), (x, gain, bias))
    for a, b in zip(kept, anew, strict=True):
        assert torch.equal(a, b)


@with_triton
def test_nothing_is_nothing() -> None:
    x, weight = torch.zeros(0, 4, 2, 2, device=DEVICE, requires_grad=True), torch.ones(4, device=DEVICE)
    y = group_norm(x, 2, weight, weight, backend="triton")
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


@pytest.mark.parametrize("silu", [False, True])
def test_the_module_is_pytorchs(silu: bool) -> None:
    """The same weights under the same names; bit by bit the same on a CPU, whatever the type."""
    theirs = nn.GroupNorm(2, 6, eps=1e-3)
    nn.init.normal_(theirs.weight)
    ours = GroupNorm(2, 6, eps=1e-3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 4, 4)
    expected = theirs(x)
    assert torch.equal(ours(x, silu), F.silu(expected) if silu else expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x.bfloat16()).dtype == theirs(x.bfloat16()).dtype
    bare = GroupNorm(2, 6, affine=False)
    assert bare.weight is None
    assert torch.equal(bare(x), F.group_norm(x, 2))


def test_errors_say_why() -> None:
    x, weight = torch.zeros(1, 4, 2, 2, dtype=torch.float64, device=DEVICE), torch.ones(4, device=DEVICE)
    assert "float64" in why_not_group_norm(x) or not HAS_TRITON
    with pytest.raises(ValueError, match="cannot run through Triton"):
        group_norm(x, 2, weight, weight, backend="triton")
    with pytest.raises(ValueError, match="lacks gain or bias"):
        group_norm(x.float(), 2, None, None, backend="triton")
    assert channels_last(x) is x


# The sizes of the release: the VAE's largest map and the UNet's.
REAL = [((2, 128, 512, 512), 32, torch.float32), ((32, 512, 64, 64), 32, torch.float32),
        ((8, 320, 64, 64), 32, torch.bfloat16), ((8, 960, 64, 64), 32, torch.bfloat16),
        ((8, 1920, 16, 16), 32, torch.float16), ((2, 2560, 8, 8), 32, torch.bfloat16)]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("silu", [False, True], ids=["alone", "silu"])
@pytest.mark.parametrize(("shape", "groups", "kind"), REAL, ids=str)
def test_real_sizes(shape: tuple[int, ...], groups: int, kind: torch.dtype, silu: bool) -> None:
    given = [x.to(kind).double() for x in drawn(shape)]
    exact = run(given, groups, torch.float64, "plain", silu)
    for found, truth in zip(run(given, groups, kind, "auto", silu), exact, strict=True):
        assert far(found, truth) < (1e-5 if kind == torch.float32 else 2 * HALF[kind])  # the gradient is rounded, too


@pytest.mark.gpu
def test_auto_takes_the_kernels_for_maps_with_channels_last_only(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = GroupNorm(4, 8).cuda()
    x = torch.randn(2, 8, 16, 16, device="cuda")
    assert channels_last(x).is_contiguous(memory_format=torch.channels_last)
    for given, taken in ((x, False), (channels_last(x), True), (channels_last(x).double(), False)):
        y = norm.to(given.dtype)(given.requires_grad_(), silu=True)
        assert (type(y.grad_fn).__name__ == "_KernelsBackward") == taken
    monkeypatch.setattr("mm_interleaved.ops.group_norm.KERNELS", False)
    assert channels_last(x) is x


@pytest.mark.gpu
def test_recorded_and_compiled() -> None:
    norm, x = GroupNorm(4, 8).cuda(), torch.randn(2, 8, 16, 16, device="cuda")
    x = channels_last(x)
    with torch.no_grad():
        expected = norm(x, silu=True)
        torch.testing.assert_close(
            torch.compile(norm, fullgraph=True)(x, silu=True), expected
        )  # by the compiler's own kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = norm(x, silu=True)
        graph.replay()
        assert torch.equal(found, expected)
