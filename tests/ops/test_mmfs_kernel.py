"""The Triton kernels of MMFS attention against their plain reference, at tiny sizes.

Without a CUDA device they run in Triton's interpreter (tests/conftest.py sets TRITON_INTERPRET), which executes the
same source in NumPy: it finds wrong arithmetic and wrong addresses, not races between programs.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mm_interleaved.model.config import MMFSConfig
from mm_interleaved.model.mmfs import MMFS, VisibleImages
from mm_interleaved.ops import MMFSInputs, mmfs_attention, mmfs_attention_reference, why_not_triton
from mm_interleaved.ops.mmfs_attention import HAS_TRITON, mmfs_attention_kernel, mmfs_output

from ..conftest import awaken
from .mmfs_inputs import LEAVES, arguments, cast, relative, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(params=["one query and many slots", "many queries"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both shapes of a block of work, whatever the size of the problem."""
    from mm_interleaved.ops import mmfs_triton_shared

    monkeypatch.setattr(mmfs_triton_shared, "FEW_PROGRAMS", 10**9 if request.param.startswith("one") else 0)


def compare(given: dict, bound: float = 1e-5) -> dict[str, torch.Tensor]:
    expected, found = run(given, "plain"), run(given, "triton")
    for name, x in expected.items():
        assert found[name].shape == x.shape
        assert found[name].dtype == x.dtype, name
        assert relative(found[name], x) < bound, name
    return found


LARGER = {"slots": 3, "images": 3, "points": 4, "shapes": [(8, 8), (4, 4), (2, 2)]}  # enough samples for an average
CASES = {
    "tokens": {"groups": 5, "slots": 3, "images": 3, "points": 4},
    "maps of queries": {"groups": 2, "queries": 5},
    "one query": {"groups": 1, "slots": 6, "images": 6},
    "one map": {"shapes": [(3, 3)], "heads": 1, "points": 1},
    "oblong maps": {"shapes": [(5, 3), (2, 4)], "queries": 2},
    "numbers that are no powers of two": {"points": 3, "dim": 12, "heads": 3, "slots": 5},
    "four levels": {"shapes": [(8, 8), (4, 4), (2, 2), (1, 1)], "points": 2, "dim": 32},
}


@with_triton
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_the_twins(case: str, tile: None) -> None:
    compare(arguments(**CASES[case], device=DEVICE))


@with_triton
@pytest.mark.parametrize("seed", range(3))
def test_ragged_counts(seed: int, tile: None) -> None:
    given = arguments(groups=6, slots=4, images=5, seed=seed, points=2, heads=1, device=DEVICE)
    assert len({int(n) for n in (given["images"] >= 0).sum(1)}) > 2
    compare(given)


@with_triton
def test_reference_points_of_every_group(tile: None) -> None:
    given = arguments(groups=3, queries=2, device=DEVICE)
    given["reference"] = torch.rand(3, 2, 2, device=DEVICE)
    compare(given)


@with_triton
def test_nobody_sees_anything(tile: None) -> None:
    given = arguments(device=DEVICE)
    given["images"] = torch.full_like(given["images"], -1)
    found = run(given, "triton")
    assert (found.pop("ignored") == 1).all()
    assert not any(x.any() for x in found.values())


@with_triton
@pytest.mark.parametrize("none", ["slots", "groups", "images"])
def test_nothing_at_all(none: str) -> None:
    given = arguments(slots=0 if none == "slots" else 2, device=DEVICE)
    if none == "groups":
        given |= {k: given[k][:0] for k in ("offsets", "logits", "images")}
    if none == "images":
        given |= {"values": given["values"][:0], "images": torch.full_like(given["images"], -1)}
    mixed, ignored = mmfs_attention(MMFSInputs(**given), backend="triton")
    assert mixed.shape == (*given["offsets"].shape[:2], *given["values"].shape[2:])
    assert not mixed.any()
    assert (ignored == 1).all()


@with_triton
@pytest.mark.parametrize("far", [30.0, 1e6, 1e30])
def test_far_outside(far: float, tile: None) -> None:
    """Some samples lie far outside; all of them, then everything is zero but the softmax."""
    given = arguments(device=DEVICE)
    given["offsets"] = given["offsets"] * far
    compare(given)
    given["offsets"] = torch.full_like(given["offsets"], far)
    found = run(given, "triton")
    assert not found["mixed"].any()
    assert not found["values"].any()
    assert not found["offsets"].any()


@with_triton
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_extreme_logits(size: float, tile: None) -> None:
    """At 1e4 neighbouring float32 numbers are 1e-3 apart, and so are the weights of equal logits."""
    given = arguments(device=DEVICE)
    given["logits"] = torch.where(given["logits"] > 1, size, -size)
    found = compare(given, bound=1e-5 if size < 1e3 else 2e-3)
    assert all(x.isfinite().all() for x in found.values())
    given["logits"] = torch.full_like(given["logits"], -size)
    assert (run(given, "triton")["ignored"] == 1).all()


@with_triton
def test_non_contiguous_inputs(tile: None) -> None:
    """Columns of a wider product, as the folded query side gives them; values, images and points with odd strides."""
    given = arguments(groups=3, queries=2, device=DEVICE)
    expected = run(given, "triton")
    width = given["offsets"].shape[-1]
    both = torch.cat([given["offsets"], given["logits"]], -1)
    strided = given | {
        "offsets": both[..., :width],
        "logits": both[..., width:],
        "values": given["values"].transpose(1, 2).contiguous().transpose(1, 2),
        "images": given["images"].T.contiguous().T,
        "reference": given["reference"].transpose(1, 2).contiguous().transpose(1, 2),
        "offset_table": given["offset_table"].T.contiguous().T,
    }
    assert not any(strided[k].is_contiguous() for k in ("offsets", "logits", "values", "images", "reference"))
    mixed, ignored = mmfs_attention(MMFSInputs(**strided), backend="triton")
    torch.testing.assert_close(mixed, expected["mixed"])
    torch.testing.assert_close(ignored, expected["ignored"])


@with_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, tile: None) -> None:
    """Sums run in float32: results are exact for the rounded inputs, gradients are rounded once."""
    given = arguments(**LARGER, dtype=dtype, device=DEVICE)
    exact, found = run(cast(given, torch.float64), "plain"), run(given, "triton")
    for name, x in exact.items():
        rounded = name in LEAVES
        assert found[name].dtype == (dtype if rounded else torch.float32)
        assert relative(found[name], x) < (torch.finfo(dtype).eps / 2 if rounded else 2e-6), name


@with_triton
def test_gradients_are_the_same_every_time(tile: None) -> None:
    """Nothing is added up in an order that chance decides."""
    given = arguments(groups=5, device=DEVICE)
    first, second = run(given, "triton"), run(given, "triton")
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@with_triton
def test_packed_documents() -> None:
    """An image stands in another slot for every query, and some are in no document."""
    given = arguments(**(LARGER | {"groups": 7, "images": 6}), device=DEVICE)
    rows = [[-1, -1, -1], [0, -1, -1], [2, 0, -1], [4, 2, 0], [1, -1, -1], [5, 1, -1], [-1, 5, -1]]
    given["images"] = torch.tensor(rows, device=DEVICE)
    found = compare(given)
    assert not found["values"][3].any()
    assert all(found["values"][i].any() for i in (0, 1, 2, 4, 5))


BLOCKS = {
    "one part": {"QUERIES": 16},
    "parts of the queries": {"QUERIES": 16, "FEW_TILES": 10**6},
    "several tiles": {"CELLS": 16, "QUERIES": 16},
}


@with_triton
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("queries", [1, 23])
def test_many_queries_of_an_image(blocks: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a block of them in all, some of which come near a tile and some not; tokens, and maps of queries."""
    from mm_interleaved.ops import mmfs_triton_backward

    for name, value in BLOCKS[blocks].items():
        monkeypatch.setattr(mmfs_triton_backward, name, value)
    groups = 18 if queries == 1 else 1  # a block has 16
    given = arguments(groups=groups, queries=queries, slots=2, images=2, shapes=[(3, 11), (1, 1), (3, 2)], heads=1,
                      points=3, dim=6, device=DEVICE)  # fmt: skip
    given["scales"] = [1.0, 0.5, 0.25]
    given["reference"] = torch.rand(groups, queries, 2, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    given["offsets"] = given["offsets"] / 4
    compare(given)


@with_triton
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_a_query_does_not_see_cannot_harm_it(wrong: float, tile: None) -> None:
    """Memory of images that are still to come may hold anything."""
    given = arguments(groups=4, slots=2, images=3, device=DEVICE)
    given["images"] = torch.tensor([[-1, -1], [1, -1], [2, 1], [-1, 2]], device=DEVICE)
    expected = run(given, "triton")
    given["values"][0] = wrong
    found = run(given, "triton")
    assert all(torch.equal(x, found[name]) for name, x in expected.items())


@with_triton
def test_a_gradient_that_is_no_number_is_seen() -> None:
    given = arguments(device=DEVICE)
    values = given["values"].requires_grad_()
    mixed, _ = mmfs_attention(MMFSInputs(**(given | {"values": values})), backend="triton")
    (mixed * float("nan")).sum().backward()
    assert values.grad.isnan().any()


def output(given: dict, backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`mmfs_output` and the gradients of a sum of its squares."""
    leaves = {k: given[k].detach().clone().requires_grad_() for k in (*LEAVES, "ignore")}
    inputs = {k: v for k, v in (given | leaves).items() if k != "ignore"}
    out = mmfs_output(MMFSInputs(**inputs), leaves["ignore"], dtype, backend=backend)
    (out.double() ** 2).sum().backward()
    return {"out": out.detach()} | {k: v.grad for k, v in leaves.items()}


@with_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_something_in_the_slot_of_logit_zero(dtype: torch.dtype, tile: None) -> None:
    """It is added by the kernel, and the result is rounded once to the wanted type, as are the gradients."""
    given = arguments(groups=5, dtype=dtype, device=DEVICE)
    given["ignore"] = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = output(cast(given, torch.float64), "plain", torch.float64)
    found = output(given, "triton", dtype)
    assert found["out"].dtype == dtype
    for name, x in exact.items():
        assert relative(found[name], x) < (1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps), name


@with_triton
def test_without_gradients_the_operator_is_passed_by() -> None:
    given = arguments(groups=5, device=DEVICE)
    expected = mmfs_attention_kernel(*positional(given))[0]
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with Calls():
        found = mmfs_attention(MMFSInputs(**given), backend="triton")[0]
    assert torch.equal(found, expected)
    assert not any("mm_interleaved" in name for name in calls)


@with_triton
def test_values_that_need_no_gradient() -> None:
    given = arguments(device=DEVICE)
    offsets = given["offsets"].requires_grad_()
    mmfs_attention(MMFSInputs(**given), backend="triton")[0].square().sum().backward()
    found, offsets.grad = offsets.grad, None
    mmfs_attention(MMFSInputs(**given), backend="plain")[0].square().sum().backward()
    assert relative(found, offsets.grad) < 1e-5


def positional(given: dict) -> tuple:
    shapes = [size for shape in given["shapes"] for size in shape]
    tensors = [given[k] for k in (*LEAVES, "reference", "images")]
    return (*tensors, shapes, given["scales"], given.get("ignore"), torch.float32)


@with_triton
def test_registration() -> None:
    """Schema, fake kernel, autograd and tracing, by PyTorch's own checks."""
    given = arguments(groups=2, points=2, heads=1, device=DEVICE)
    for name in LEAVES:
        given[name].requires_grad_()
    torch.library.opcheck(mmfs_attention_kernel, positional(given))
    given["ignore"] = torch.randn(1, 16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(mmfs_attention_kernel, positional(given))


@with_triton
@pytest.mark.parametrize("way", ["compiled", "checkpointed"])
def test_compiled_and_checkpointed(way: str) -> None:
    given = arguments(groups=2, points=2, device=DEVICE)
    expected = run(given, "triton")
    values = given["values"].clone().requires_grad_()

    def call(values: torch.Tensor) -> torch.Tensor:
        mixed, ignored = mmfs_attention(MMFSInputs(**(given | {"values": values})), backend="triton")
        return mixed + ignored[..., None]

    if way == "compiled":
        out = torch.compile(call, backend="aot_eager", fullgraph=True)(values)
    else:
        out = checkpoint(call, values, use_reentrant=False)
    torch.testing.assert_close(out.detach(), expected["mixed"] + expected["ignored"][..., None])
    out.square().sum().backward()
    found, values.grad = values.grad, None
    call(values).square().sum().backward()
    torch.testing.assert_close(found, values.grad)


CONFIG = MMFSConfig(hidden_size=8, levels=[4, 2], num_heads=2, num_points=3, max_images=6, base_size=2)


@with_triton
@pytest.mark.parametrize("derive", [True, False])
def test_the_layer(derive: bool) -> None:
    """MMFS with the kernels inside: output, and gradients of all its parameters."""
    results = []
    for backend in ("plain", "triton"):
        torch.manual_seed(0)
        mmfs = awaken(MMFS(CONFIG, query_size=10, feature_size=6))
        mmfs.backend = backend
        query, features = torch.randn(4, 1, 10), torch.randn(3, 20, 6)
        mmfs, query, features = mmfs.to(DEVICE), query.to(DEVICE), features.to(DEVICE)
        visible = VisibleImages.build(torch.tensor([[-1, -1], [0, -1], [1, 0], [2, -1]], device=DEVICE), 3)
        centre = torch.full((1, 1, 2), 0.5, device=DEVICE)
        derived = mmfs.derive_query() if derive else None
        out = mmfs(query, mmfs.project(features), visible, [(4, 4), (2, 2)], centre, 2, derived)
        out.square().sum().backward()
        gradients = [p.grad for p in mmfs.parameters() if not derive or p.grad is not None]
        results.append([out.detach(), *gradients])
    for plain, found in zip(*results, strict=True):
        assert relative(found, plain) < 1e-5


class Adapted(torch.nn.Linear):
    """What adapters are: a linear map that is more than its weights."""


@pytest.mark.parametrize("halved", [False, True])
def test_training_folds_the_query_side(halved: bool) -> None:
    """Where there are more queries than folded outputs: the same output and gradients, by another order of products."""
    results = []
    for kind in (Adapted, torch.nn.Linear):
        torch.manual_seed(0)
        mmfs = awaken(MMFS(CONFIG, query_size=10, feature_size=6))
        mmfs.dynamic_offset_mask.__class__ = kind
        query = torch.randn(2, 20, 10)
        with torch.autocast("cpu", torch.bfloat16, enabled=halved):
            assert (mmfs._derived_for(query, 2) is None) == (kind is Adapted)
            assert mmfs._derived_for(query[:, :12], 2) is None
            values = mmfs.project(torch.randn(3, 20, 6))
            visible = VisibleImages.build(torch.tensor([[1, 0], [2, -1]]), 3)
            out = mmfs(query, values, visible, [(4, 4), (2, 2)], torch.full((1, 20, 2), 0.5), 2)
        out.float().square().sum().backward()
        results.append([out.detach(), *(p.grad for p in mmfs.parameters())])
    for apart, folded in zip(*results, strict=True):
        assert folded.dtype == apart.dtype
        assert relative(folded, apart) < (5e-2 if halved else 1e-5)


def test_gradcheck_of_the_twin() -> None:
    given = arguments(groups=2, queries=1, images=2, slots=2, shapes=[(3, 4), (2, 2)], heads=1, points=2, dim=2,
                      dtype=torch.float64)  # fmt: skip
    leaves = [given[k].requires_grad_() for k in LEAVES]

    def call(*leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mmfs_attention_reference(MMFSInputs(**(given | dict(zip(LEAVES, leaves, strict=True)))))

    assert torch.autograd.gradcheck(call, leaves, eps=1e-7, atol=1e-5)


def test_the_plain_form_is_the_choice_on_a_cpu() -> None:
    given = arguments()
    chosen, plain = mmfs_attention(MMFSInputs(**given)), mmfs_attention_reference(MMFSInputs(**given))
    assert all(torch.equal(a, b) for a, b in zip(chosen, plain, strict=True))


def test_what_the_kernels_do_not_know() -> None:
    """The reason is given, and an explicit wish is never answered with something else."""
    given = arguments(dtype=torch.float64)
    reason = why_not_triton(given["values"], 4)
    assert reason
    with pytest.raises(ValueError, match="MMFS attention cannot run through Triton: "):
        mmfs_attention(MMFSInputs(**given), backend="triton")


@with_triton
@pytest.mark.parametrize(
    ("change", "points", "message"),
    [
        (lambda v: v.double(), 4, "not torch.float64"),
        (lambda v: v.expand(-1, -1, -1, 16).repeat(1, 1, 1, 16), 4, "heads have 256 channels"),
        (lambda v: v, 17, "17 points"),
        (lambda v: v.to("meta"), 4, "for CUDA devices, and the values are on meta"),
    ],
)
def test_reasons(change, points: int, message: str) -> None:
    assert message in why_not_triton(change(arguments(device=DEVICE)["values"]), points)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": [(8, 8), (4, 4)]}, "20 positions"),
        ({"scales": [1.0]}, "1 scales for 2 levels"),
        ({"logits": torch.zeros(3, 1, 7)}, r"logits \(3, 1, 7\)"),
        ({"images": torch.zeros(4, 3, dtype=torch.long)}, "4 rows of images for 3 groups"),
        ({"images": torch.zeros(3, 1, dtype=torch.long)}, "for 1 slots"),
        ({"reference": torch.zeros(1, 2, 2)}, r"reference \(1, 2, 2\)"),
    ],
)
def test_shapes_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mmfs_attention(MMFSInputs(**(arguments() | changes)))
