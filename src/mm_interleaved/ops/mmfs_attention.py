"""The attention of MMFS: a weighted sum of bilinear samples from all images that are visible to a query.

Axes: I images, S spatial positions of all levels, N heads, D channels of a head, V levels, P points, Q queries,
G groups of queries with the same visible images, R slots of a group for visible images, the most recent one first.

For group g, query q, head n; slot r is the r-th most recent image of the group, v a level, p a point:

    o_rp    = offsets[g, q, n, p] + offset_table[r, n, p]
    a_rvp   = logits[g, q, n, v, p] + logit_table[r, n, v, p]
    x_rvp   = reference[g, q] * size_v + o_rp * scales[v] - 1/2              in pixels of level v
    w       = softmax over all visible (r, v, p) and one more slot of logit 0
    mixed   = sum over (r, v, p) of w_rvp * bilinear(value_v[images[g, r], :, n], x_rvp)
    ignored = the weight of the slot of logit 0

This is MM-Interleaved (arXiv 2401.10208), section 3.2, in the form that docs/model.md, "Computed form", derives.

`mmfs_attention_reference` is made of PyTorch operators: it is the reference implementation, and runs on a CPU. The
registered operator `mm_interleaved::mmfs_attention` runs the Triton kernels of `mmfs_triton.py`, which store only the
result and the logarithm of the softmax's denominator. `mmfs_attention` chooses between them; `why_not_triton` gives the
reason. `mmfs_output` adds the value of the slot of logit 0.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import Parameter

from .deformable import Shapes, deformable_attention, promote
from .devices import chooses_kernels, shapes_only

Backend = Literal["auto", "triton", "plain"]

HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_DIM, MOST_POINTS = 128, 16


def on_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on `device`: a CUDA device, or a CPU with Triton's interpreter (for tests)."""
    return chooses_kernels(device) or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def why_not_triton(values: Tensor, points: int) -> str | None:
    """Why the Triton kernels cannot run on `values` [I, S, N, D]; None: they can.

    On a CPU they run in Triton's interpreter if TRITON_INTERPRET=1 was set before Triton was imported. That is meant
    for tests; `backend="auto"` does not choose it.
    """
    if HAS_TRITON and not on_triton(values.device):
        return f"the kernels are for CUDA devices, and the values are on {values.device}"
    return why_no_kernel(values.dtype, values.shape[-1], points)


def why_no_kernel(dtype: torch.dtype, head_dim: int, points: int) -> str | None:
    """Why there is no Triton kernel for values of this type and size, on any device; None: there is one."""
    if not HAS_TRITON and not shapes_only():
        return "Triton is not installed"
    if dtype not in KERNEL_DTYPES:
        return f"the kernels support {', '.join(str(d) for d in KERNEL_DTYPES)}, not {dtype}"
    if head_dim > LARGEST_DIM:
        return f"heads have {head_dim} channels; the kernels support at most {LARGEST_DIM}"
    if points > MOST_POINTS:
        return f"there are {points} points; the kernels support at most {MOST_POINTS}"
    return None


@dataclass
class MMFSInputs:
    """The inputs of MMFS attention.

    Attributes:
        values: [I, S, N, D], the levels one after the other, each row-major.
        offsets: [G, Q, N * P * 2], (x, y) last; shared by the levels.
        logits: [G, Q, N * V * P].
        offset_table: [R, N * P * 2], added to `offsets` for each slot.
        logit_table: [R, N * V * P], added to `logits` for each slot.
        reference: [G or 1, Q, 2] (x, y) in [0, 1]; the kernels compute no gradient for it.
        images: [G, R] image numbers, most recent first; -1 where there is none.
        shapes: (height, width) of every level.
        scales: for every level the pixels of an offset of 1.
        routes: `image_routes(images, I)`, if it was computed before; only the reference implementation uses it.
    """

    values: Tensor
    offsets: Tensor
    logits: Tensor
    offset_table: Tensor
    logit_table: Tensor
    reference: Tensor
    images: Tensor
    shapes: Shapes
    scales: Sequence[float]
    routes: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor arguments of the registered operator, in its order."""
        return (
            self.values, self.offsets, self.logits, self.offset_table, self.logit_table, self.reference, self.images,
        )  # fmt: skip

    @property
    def heads(self) -> int:
        """The number of heads."""
        return self.values.shape[2]

    @property
    def points(self) -> int:
        """The number of points that a head samples from a level of an image."""
        return self.offsets.shape[-1] // (2 * self.heads)

    def check(self) -> None:
        """Check that the shapes fit together; otherwise a kernel would read out of bounds.

        Raises:
            ValueError: names the shapes that do not fit.
        """
        offsets, logits, images, reference = self.offsets, self.logits, self.images, self.reference
        levels, slots = len(self.shapes), images.shape[1]
        tables = tuple(self.offset_table.shape), tuple(self.logit_table.shape)
        positions = self.values.shape[1]
        wrong = None
        if positions != sum(h * w for h, w in self.shapes):
            wrong = f"values have {positions} positions, but shapes are {list(self.shapes)}"
        elif len(self.scales) != levels:
            wrong = f"{len(self.scales)} scales for {levels} levels"
        elif offsets.shape[-1] != self.heads * self.points * 2:
            wrong = f"offsets of width {offsets.shape[-1]} for {self.heads} heads"
        elif logits.shape != (*offsets.shape[:2], self.heads * levels * self.points):
            wrong = (
                f"logits {tuple(logits.shape)} for offsets {tuple(offsets.shape)}, {self.heads} heads, {levels} levels"
            )
        elif images.shape[0] != offsets.shape[0]:
            wrong = f"{images.shape[0]} rows of images for {offsets.shape[0]} groups"
        elif tables != ((slots, offsets.shape[-1]), (slots, logits.shape[-1])):
            wrong = f"tables {tables[0]} and {tables[1]} for {slots} slots"
        elif reference.shape[0] not in (1, offsets.shape[0]) or reference.shape[1] != offsets.shape[1]:
            wrong = f"reference {tuple(reference.shape)} for offsets {tuple(offsets.shape)}"
        if wrong is not None:
            raise ValueError(f"MMFS attention: {wrong}")

    def take_kernels(self, backend: Backend) -> bool:
        """Whether `backend` chooses the kernels for these inputs.

        Raises:
            ValueError: backend="triton", but the kernels cannot run.
        """
        if backend == "plain":
            return False
        reason = why_not_triton(self.values, self.points)
        if backend == "triton" and reason is not None:
            raise ValueError(f"MMFS attention cannot run through Triton: {reason}")
        return backend == "triton" or (reason is None and chooses_kernels(self.values.device))


def mmfs_attention(inputs: MMFSInputs, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """The weighted sums of samples from each query's visible images.

    Args:
        inputs: see `MMFSInputs`.
        backend: "auto" uses the kernels on a CUDA device unless `why_not_triton` has a reason against it, otherwise
            PyTorch's operators.

    Returns:
        The sums [G, Q, N, D] and the weights of the slot of logit 0 [G, Q, N], in float32 (float64 for float64).

    Raises:
        ValueError: backend="triton", but the kernels cannot run; shapes that do not fit together.
    """
    inputs.check()
    if not inputs.take_kernels(backend):
        return mmfs_attention_reference(inputs)
    if inputs.images.numel() == 0:
        return _nothing(inputs)
    mixed, lse = _run_kernels(inputs, None, torch.float32)
    return mixed, (-lse).exp()


def mmfs_output(inputs: MMFSInputs, ignore: Tensor, dtype: torch.dtype, *, backend: Backend = "auto") -> Tensor:
    """`mmfs_attention` with a value for the slot of logit 0: mixed + ignored * `ignore`, in one kernel.

    Args:
        inputs: see `MMFSInputs`.
        ignore: [N, D] the value of the slot of logit 0.
        dtype: type of the result; sums are computed in float32 or better.
        backend: as in `mmfs_attention`, with the same errors.

    Returns:
        [G, Q, N, D].
    """
    inputs.check()
    if inputs.images.numel() > 0 and inputs.take_kernels(backend):
        return _run_kernels(inputs, ignore, dtype)[0]
    mixed, ignored = mmfs_attention(inputs, backend=backend)
    return (mixed + ignored[..., None] * ignore).to(dtype)


def _run_kernels(inputs: MMFSInputs, ignore: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Call the registered operator if gradients, the compiler or tensor subclasses need it; else the kernel directly.

    The direct call costs the host less time.
    """
    tensors, flat = inputs.tensors, [size for shape in inputs.shapes for size in shape]
    given = tensors if ignore is None else (*tensors, ignore)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if learns or torch.compiler.is_compiling() or any(type(x) not in (Tensor, Parameter) for x in given):
        return mmfs_attention_kernel(*tensors, flat, list(inputs.scales), ignore, dtype)
    from .mmfs_triton import forward

    return forward(*tensors, flat, inputs.scales, ignore=ignore, dtype=dtype)


def _nothing(inputs: MMFSInputs) -> tuple[Tensor, Tensor]:
    """The result if no image is visible to any query."""
    groups, queries, _ = inputs.offsets.shape
    work = promote(inputs.offsets.dtype)
    mixed = inputs.offsets.new_zeros(groups, queries, *inputs.values.shape[2:], dtype=work)
    return mixed, inputs.offsets.new_ones(groups, queries, inputs.heads, dtype=work)


# ----------------------------------------------------------------------------------------------------------------------
# The reference implementation


@dataclass
class SamplingPoints:
    """Where queries sample the visible images, and with which weights.

    Attributes:
        locations: [G, Q, N, R, V or 1, P, 2], (x, y) in units of the image's sides; 1 when all levels share them.
        weights: [G, Q, N, R, V, P]; 0 in slots without an image.
        ignored: [G, Q, N] the weight of the slot of logit 0.
    """

    locations: Tensor
    weights: Tensor
    ignored: Tensor


def sampling_points(inputs: MMFSInputs) -> SamplingPoints:
    """The sampling points of `inputs`, in float32 or better; at least one slot."""
    heads, points, levels = inputs.heads, inputs.points, len(inputs.shapes)
    work = promote(inputs.offsets.dtype)
    offsets = inputs.offsets.to(work)[..., None, :] + inputs.offset_table.to(work)
    logits = inputs.logits.to(work)[..., None, :] + inputs.logit_table.to(work)
    offsets = offsets.unflatten(-1, (heads, points, 2)).transpose(2, 3)  # [G, Q, N, R, P, 2]
    logits = logits.unflatten(-1, (heads, levels, points)).transpose(2, 3)  # [G, Q, N, R, V, P]
    hidden = (inputs.images < 0)[:, None, None, :, None, None]
    weights, ignored = softmax_plus_one(logits.masked_fill(hidden, -math.inf))
    return SamplingPoints(_locations(offsets, inputs.reference, inputs.shapes, inputs.scales), weights, ignored)


def mmfs_attention_reference(inputs: MMFSInputs) -> tuple[Tensor, Tensor]:
    """`mmfs_attention` in PyTorch's own operators.

    The queries that an image is visible to sample it together; the samples are then added up by query.
    """
    values, images = inputs.values, inputs.images
    if images.shape[1] == 0:
        return _nothing(inputs)
    found = sampling_points(inputs)
    routes = image_routes(images, len(values)) if inputs.routes is None else inputs.routes
    mixed = _sample(values, images, routes, inputs.shapes, found.locations, found.weights)
    return mixed.unflatten(-1, values.shape[2:]), found.ignored


def softmax_plus_one(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last three axes together with one more slot of logit 0.

    Args:
        logits: [G, Q, N, R, V, P]; -inf where there is no image.

    Returns:
        Weights of the same shape, and the weight of the extra slot [G, Q, N].
    """
    flat = logits.flatten(-3)
    both = torch.cat([torch.zeros_like(flat[..., :1]), flat], dim=-1).softmax(-1)
    return both[..., 1:].view_as(logits), both[..., 0]


def image_routes(images: Tensor, num_images: int) -> Tensor:
    """[I, longest]: for every image the positions in `images.view(-1)` that name it, padded with -1."""
    flat = images.reshape(-1)
    entries = (flat >= 0).nonzero()[:, 0]
    order = torch.argsort(flat[entries], stable=True)
    entries, image = entries[order], flat[entries][order]
    counts = torch.bincount(image, minlength=num_images)
    rank = torch.arange(len(entries), device=flat.device) - (counts.cumsum(0) - counts)[image]
    longest = int(counts.max()) if len(entries) else 0
    routes = flat.new_full((num_images, longest), -1)
    routes[image, rank] = entries
    return routes


def _locations(offsets: Tensor, reference: Tensor, shapes: Shapes, scales: Sequence[float]) -> Tensor:
    """[G, Q, N, R, V or 1, P, 2] in units of the map's size."""
    reference = reference.to(offsets.dtype)[:, :, None, None, None, None, :]
    steps = [(scale / width, scale / height) for (height, width), scale in zip(shapes, scales, strict=True)]
    if all(math.isclose(step, steps[0][0], rel_tol=1e-15) for pair in steps for step in pair):
        return reference + offsets[..., None, :, :] * steps[0][0]  # all levels have the same step
    return reference + offsets[..., None, :, :] * offsets.new_tensor(steps)[:, None, :]


def _sample(
    values: Tensor, images: Tensor, routes: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """The sum of weighted samples [G, Q, N * D], computed image by image."""
    groups, slots = images.shape
    total = weights.new_zeros((groups, weights.shape[1], values.shape[2] * values.shape[3]))
    if routes.numel() == 0:
        return total
    used = routes >= 0
    # Padding has weight 0 and may read any entry. It is spread over all entries: in the backward pass, adding hundreds
    # of thousands of zeros to a single one would take seconds.
    spread = torch.arange(routes.numel(), device=routes.device).view_as(routes) % (groups * slots)
    entry = torch.where(used, routes, spread)

    def by_image(x: Tensor) -> Tensor:
        """[G, Q, N, R, ...] to [I, longest * Q, N, ...]."""
        rows = x.movedim(3, 1).flatten(0, 1).index_select(0, entry.flatten())
        return rows.unflatten(0, entry.shape).flatten(1, 2)

    shares = by_image(weights) * used.repeat_interleave(weights.shape[1], dim=1)[:, :, None, None, None]
    taken = deformable_attention(values, shapes, by_image(locations), shares)
    taken = taken.to(weights.dtype).reshape(routes.numel(), weights.shape[1], -1)
    return total.index_add(0, (entry // slots).reshape(-1), taken)


# ----------------------------------------------------------------------------------------------------------------------
# The registered operator. Triton is imported at the first launch.


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
    """The kernels; arguments as in `MMFSInputs` and `mmfs_output`, `shapes` as height, width, height, ...

    Returns:
        The weighted sums [G, Q, N, D] in `dtype`, with `ignore` as the value of the slot of logit 0; the logarithm of
        the softmax's denominator [G, Q, N] in float32. The weight of that slot is exp(-logarithm).
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
    """The gradients of values (an empty tensor without `for_values`), offsets, logits and the two tables."""
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
