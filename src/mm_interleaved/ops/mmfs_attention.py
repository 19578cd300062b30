"""The attention of MMFS: a weighted sum of bilinear samples from every picture that a query sees.

For group g, query q, head h; slot s is the s-th most recent picture of the group, l a level, p a point:

    o_sp    = offsets[g, q, h, p] + offset_table[s, h, p]
    a_slp   = logits[g, q, h, l, p] + logit_table[s, h, l, p]
    x_slp   = reference[g, q] * size_l + o_sp * scales[l] - 1/2              in pixels of level l
    w       = softmax over all visible (s, l, p) and one more slot of logit 0
    mixed   = sum over (s, l, p) of w_slp * bilinear(value_l[images[g, s], :, h], x_slp)
    ignored = the weight of the slot of logit 0

(MM-Interleaved, arXiv 2401.10208, section 3.2, with the softmax in the form that `model/mmfs.py` derives.)

Two forms. `mmfs_attention_plain` is a composition of PyTorch operators: the truth, and what runs on a CPU. The
registered operator `mm_interleaved::mmfs_attention` runs the Triton kernels of `mmfs_triton.py`, which keep nothing but
the result and the logarithm of the softmax's denominator. `mmfs_attention` chooses; `why_not_triton` says why.
`mmfs_output` adds what the slot of logit 0 holds.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import Parameter

from .deformable import Shapes, deformable_attention, promote

Backend = Literal["auto", "triton", "plain"]

HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_DIM, MOST_POINTS = 128, 16


def on_triton(device: torch.device) -> bool:
    """Whether kernels run there: on CUDA devices, and for tests on a CPU in Triton's interpreter."""
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def why_not_triton(values: Tensor, points: int) -> str | None:
    """Why the Triton kernels cannot run on `values` [pictures, positions, heads, dim]; None: they can.

    On a CPU they run in Triton's interpreter, if TRITON_INTERPRET=1 was set before Triton was imported; that is for
    tests, and `backend="auto"` does not choose it.
    """
    if not HAS_TRITON:
        return "Triton is not installed"
    if not on_triton(values.device):
        return f"the kernels are for CUDA devices, and the values are on {values.device}"
    if values.dtype not in KERNEL_DTYPES:
        return f"the kernels know {', '.join(str(d) for d in KERNEL_DTYPES)}, not {values.dtype}"
    if values.shape[-1] > LARGEST_DIM:
        return f"heads of {values.shape[-1]} channels; the kernels take at most {LARGEST_DIM}"
    if points > MOST_POINTS:
        return f"{points} points; the kernels take at most {MOST_POINTS}"
    return None


def mmfs_attention(
    values: Tensor,
    offsets: Tensor,
    logits: Tensor,
    offset_table: Tensor,
    logit_table: Tensor,
    reference: Tensor,
    images: Tensor,
    shapes: Shapes,
    scales: Sequence[float],
    *,
    routes: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Sample the pictures that each query sees, and mix the samples.

    Args:
        values: [pictures, positions, heads, dim], the levels one after the other, each row-major.
        offsets: [groups, queries, heads * points * 2], (x, y) last; shared by the levels.
        logits: [groups, queries, heads * levels * points].
        offset_table: [slots, heads * points * 2], what the slot adds to `offsets`.
        logit_table: [slots, heads * levels * points], what it adds to `logits`.
        reference: [groups or 1, queries, 2] (x, y) in [0, 1]; it gets no gradient from the kernels.
        images: [groups, slots] numbers of pictures, most recent first; -1 where there is none.
        shapes: (height, width) of every level.
        scales: pixels of every level that an offset of 1 spans.
        routes: `picture_routes(images, pictures)`, if it is at hand; only the plain form needs it.
        backend: "auto" takes the kernels on a CUDA device unless `why_not_triton` has a reason, else the plain form.

    Returns:
        Mixed samples [groups, queries, heads, dim] and ignored weights [groups, queries, heads], in float32 (float64
        for float64).

    Raises:
        ValueError: backend="triton", but the kernels cannot run; shapes that do not fit together.
    """
    tensors = (values, offsets, logits, offset_table, logit_table, reference, images)
    if not _takes_kernels(tensors, shapes, scales, backend):
        return mmfs_attention_plain(*tensors, shapes, scales, routes=routes)
    if images.numel() == 0:
        return _nothing(values, offsets)
    mixed, lse = _run_kernels(tensors, shapes, scales, None, torch.float32)
    return mixed, (-lse).exp()


def mmfs_output(
    values: Tensor,
    offsets: Tensor,
    logits: Tensor,
    offset_table: Tensor,
    logit_table: Tensor,
    reference: Tensor,
    images: Tensor,
    shapes: Shapes,
    scales: Sequence[float],
    ignore: Tensor,
    dtype: torch.dtype,
    *,
    routes: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`mmfs_attention` with something in the slot of logit 0: mixed + ignored * `ignore`, in one pass of the kernel.

    Args:
        ignore: [heads, dim].
        dtype: of the result; sums run in float32 or better.
        values, offsets, logits, offset_table, logit_table, reference, images, shapes, scales, routes, backend: as in
            `mmfs_attention`.

    Returns:
        [groups, queries, heads, dim].
    """
    tensors = (values, offsets, logits, offset_table, logit_table, reference, images)
    if images.numel() > 0 and _takes_kernels(tensors, shapes, scales, backend):
        return _run_kernels(tensors, shapes, scales, ignore, dtype)[0]
    mixed, ignored = mmfs_attention(*tensors, shapes, scales, routes=routes, backend=backend)
    return (mixed + ignored[..., None] * ignore).to(dtype)


def _takes_kernels(tensors: tuple[Tensor, ...], shapes: Shapes, scales: Sequence[float], backend: Backend) -> bool:
    """Which form `backend` means for these arguments, which are looked at here."""
    _check(*tensors, shapes, scales)
    values, offsets = tensors[:2]
    reason = why_not_triton(values, offsets.shape[-1] // (2 * values.shape[2])) if backend != "plain" else None
    if backend == "triton" and reason is not None:
        raise ValueError(f"MMFS attention cannot run through Triton: {reason}")
    return backend == "triton" or (backend == "auto" and reason is None and values.device.type == "cuda")


def _run_kernels(
    tensors: tuple[Tensor, ...], shapes: Shapes, scales: Sequence[float], ignore: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Through the registered operator where somebody wants to know of it; else past it, which costs the host less."""
    flat = [size for shape in shapes for size in shape]
    given = tensors if ignore is None else (*tensors, ignore)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if learns or torch.compiler.is_compiling() or any(type(x) not in (Tensor, Parameter) for x in given):
        return mmfs_attention_kernel(*tensors, flat, list(scales), ignore, dtype)
    from .mmfs_triton import forward

    return forward(*tensors, flat, scales, ignore=ignore, dtype=dtype)


def _check(
    values: Tensor,
    offsets: Tensor,
    logits: Tensor,
    offset_table: Tensor,
    logit_table: Tensor,
    reference: Tensor,
    images: Tensor,
    shapes: Shapes,
    scales: Sequence[float],
) -> None:
    """Shapes that do not fit together would make a kernel read foreign memory."""
    _, positions, heads, _ = values.shape
    points, slots = offsets.shape[-1] // (2 * heads), images.shape[1]
    wrong = None
    if positions != sum(h * w for h, w in shapes):
        wrong = f"values have {positions} positions, shapes {list(shapes)} others"
    elif len(scales) != len(shapes):
        wrong = f"{len(scales)} scales for {len(shapes)} levels"
    elif offsets.shape[-1] != heads * points * 2:
        wrong = f"offsets of width {offsets.shape[-1]} for {heads} heads"
    elif logits.shape != (*offsets.shape[:2], heads * len(shapes) * points):
        wrong = f"logits {tuple(logits.shape)} for offsets {tuple(offsets.shape)}, {heads} heads, {len(shapes)} levels"
    elif images.shape[0] != offsets.shape[0]:
        wrong = f"{images.shape[0]} rows of images for {offsets.shape[0]} groups"
    elif offset_table.shape != (slots, offsets.shape[-1]) or logit_table.shape != (slots, logits.shape[-1]):
        wrong = f"tables {tuple(offset_table.shape)} and {tuple(logit_table.shape)} for {slots} slots"
    elif reference.shape[0] not in (1, offsets.shape[0]) or reference.shape[1] != offsets.shape[1]:
        wrong = f"reference {tuple(reference.shape)} for offsets {tuple(offsets.shape)}"
    if wrong is not None:
        raise ValueError(f"MMFS attention: {wrong}")


def _nothing(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Where nobody sees a picture."""
    groups, queries, _ = offsets.shape
    work = promote(offsets.dtype)
    mixed = offsets.new_zeros(groups, queries, *values.shape[2:], dtype=work)
    return mixed, offsets.new_ones(groups, queries, values.shape[2], dtype=work)


# ----------------------------------------------------------------------------------------------------------------------
# The plain form


def mmfs_attention_plain(
    values: Tensor,
    offsets: Tensor,
    logits: Tensor,
    offset_table: Tensor,
    logit_table: Tensor,
    reference: Tensor,
    images: Tensor,
    shapes: Shapes,
    scales: Sequence[float],
    *,
    routes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The twin of the kernels in PyTorch's own operators; arguments and results as in `mmfs_attention`.

    Every picture is sampled by the queries that see it, together, and the samples are added up.
    """
    if images.shape[1] == 0:
        return _nothing(values, offsets)
    heads, levels = values.shape[2], len(shapes)
    points = offsets.shape[-1] // (2 * heads)
    work = promote(offsets.dtype)
    offsets = offsets.to(work)[..., None, :] + offset_table.to(work)
    logits = logits.to(work)[..., None, :] + logit_table.to(work)
    offsets = offsets.unflatten(-1, (heads, points, 2)).transpose(2, 3)  # [groups, queries, heads, slots, points, 2]
    logits = logits.unflatten(-1, (heads, levels, points)).transpose(2, 3)
    hidden = (images < 0)[:, None, None, :, None, None]
    weights, ignored = softmax_plus_one(logits.masked_fill(hidden, -math.inf))
    locations = _locations(offsets, reference, shapes, scales)
    routes = picture_routes(images, len(values)) if routes is None else routes
    mixed = _sample(values, images, routes, shapes, locations, weights)
    return mixed.unflatten(-1, values.shape[2:]), ignored


def softmax_plus_one(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last three axes together with one more slot of logit 0.

    Args:
        logits: [groups, queries, heads, slots, levels, points]; -inf where there is no picture.

    Returns:
        Weights of the same shape, and the weight of the extra slot [groups, queries, heads].
    """
    flat = logits.flatten(-3)
    both = torch.cat([torch.zeros_like(flat[..., :1]), flat], dim=-1).softmax(-1)
    return both[..., 1:].view_as(logits), both[..., 0]


def picture_routes(images: Tensor, num_images: int) -> Tensor:
    """[pictures, longest]: for every picture the positions in `images.view(-1)` that name it, padded with -1."""
    flat = images.reshape(-1)
    entries = (flat >= 0).nonzero()[:, 0]
    order = torch.argsort(flat[entries], stable=True)
    entries, picture = entries[order], flat[entries][order]
    counts = torch.bincount(picture, minlength=num_images)
    rank = torch.arange(len(entries), device=flat.device) - (counts.cumsum(0) - counts)[picture]
    longest = int(counts.max()) if len(entries) else 0
    routes = flat.new_full((num_images, longest), -1)
    routes[picture, rank] = entries
    return routes


def _locations(offsets: Tensor, reference: Tensor, shapes: Shapes, scales: Sequence[float]) -> Tensor:
    """[groups, queries, heads, slots, levels or 1, points, 2] in units of the map's size."""
    reference = reference.to(offsets.dtype)[:, :, None, None, None, None, :]
    steps = [(scale / width, scale / height) for (height, width), scale in zip(shapes, scales, strict=True)]
    if all(math.isclose(step, steps[0][0], rel_tol=1e-15) for pair in steps for step in pair):
        return reference + offsets[..., None, :, :] * steps[0][0]  # the maps have their nominal size
    return reference + offsets[..., None, :, :] * offsets.new_tensor(steps)[:, None, :]


def _sample(
    values: Tensor, images: Tensor, routes: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Sum of weighted samples [groups, queries, heads * dim], picture by picture."""
    groups, slots = images.shape
    total = weights.new_zeros((groups, weights.shape[1], values.shape[2] * values.shape[3]))
    if routes.numel() == 0:
        return total
    used = routes >= 0
    # Padding weighs nothing and could read any entry. It is spread over all of them: in the backward pass, adding
    # hundreds of thousands of zeros to a single one would take seconds.
    spread = torch.arange(routes.numel(), device=routes.device).view_as(routes) % (groups * slots)
    entry = torch.where(used, routes, spread)

    def by_picture(x: Tensor) -> Tensor:
        """[groups, queries, heads, slots, ...] to [pictures, longest * queries, heads, ...]."""
        rows = x.movedim(3, 1).flatten(0, 1).index_select(0, entry.flatten())
        return rows.unflatten(0, entry.shape).flatten(1, 2)

    shares = by_picture(weights) * used.repeat_interleave(weights.shape[1], dim=1)[:, :, None, None, None]
    taken = deformable_attention(values, shapes, by_picture(locations), shares)
    taken = taken.to(weights.dtype).reshape(routes.numel(), weights.shape[1], -1)
    return total.index_add(0, (entry // slots).reshape(-1), taken)


# ----------------------------------------------------------------------------------------------------------------------
# The registered operator. Triton is imported by its first launch.


@custom_op("mm_interleaved::mmfs_attention", mutates_args=())
def mmfs_attention_kernel(
    values: Tensor,
    offsets: Tensor,
    logits: Tensor,
    offset_table: Tensor,
    logit_table: Tensor,
    reference: Tensor,
    images: Tensor,
    shapes: list[int],
    scales: list[float],
    ignore: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The kernels; arguments as in `mmfs_output`, `shapes` as height, width, height, ...

    Returns:
        Mixed samples [groups, queries, heads, dim], with `ignore` in the slot of logit 0, in `dtype`; the logarithm of
        the softmax's denominator [groups, queries, heads], float32. The ignored weight is exp of minus the latter.
    """
    from .mmfs_triton import forward

    inputs = (values, offsets, logits, offset_table, logit_table, reference, images, shapes, scales)
    return forward(*inputs, ignore=ignore, dtype=dtype)


@mmfs_attention_kernel.register_fake
def _(values, offsets, logits, offset_table, logit_table, reference, images, shapes, scales, ignore, dtype):
    groups, queries, _ = offsets.shape
    mixed = values.new_empty((groups, queries, values.shape[2], values.shape[3]), dtype=dtype)
    return mixed, values.new_empty((groups, queries, values.shape[2]), dtype=torch.float32)


@custom_op("mm_interleaved::mmfs_attention_backward", mutates_args=())
def mmfs_attention_backward(
    grad_mixed: Tensor,
    grad_lse: Tensor | None,
    mixed: Tensor,
    lse: Tensor,
    values: Tensor,
    offsets: Tensor,
    logits: Tensor,
    offset_table: Tensor,
    logit_table: Tensor,
    reference: Tensor,
    images: Tensor,
    shapes: list[int],
    scales: list[float],
    for_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to values (an empty tensor without `for_values`), offsets, logits and the two tables."""
    from .mmfs_triton_backward import backward

    inputs = (values, offsets, logits, offset_table, logit_table, reference, images, shapes, scales)
    return backward(grad_mixed, grad_lse, mixed, lse, *inputs, for_values=for_values)


@mmfs_attention_backward.register_fake
def _(grad_mixed, grad_lse, mixed, lse, values, offsets, logits, offset_table, logit_table, *rest):
    for_values = rest[-1]
    of_values = values.new_empty(values.shape if for_values else (0,))
    return (of_values, *(x.new_empty(x.shape) for x in (offsets, logits, offset_table, logit_table)))


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.shapes, ctx.scales, ignore, _ = inputs
    ctx.ignore_dtype = None if ignore is None else ignore.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *tensors)


def _gradients(ctx, grad_mixed: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    mixed, lse, *inputs = ctx.saved_tensors
    grad_mixed = torch.zeros_like(mixed) if grad_mixed is None else grad_mixed
    for_values = ctx.needs_input_grad[0]
    of_values, *others = mmfs_attention_backward(
        grad_mixed, grad_lse, mixed, lse, *inputs, ctx.shapes, ctx.scales, for_values
    )
    of_ignore = None
    if ctx.needs_input_grad[9]:
        of_ignore = torch.einsum("gqh,gqhd->hd", (-lse).exp(), grad_mixed.float()).to(ctx.ignore_dtype)
    return (of_values if for_values else None, *others, None, None, None, None, of_ignore, None)


mmfs_attention_kernel.register_autograd(_gradients, setup_context=_keep)
