"""Deformable attention from offsets and logits around fixed points, as the ViT adapter uses it.

    locations_lp = reference + offsets_lp / size_l          weights = softmax of the logits over all levels and points
    out          = `deformable_attention` of these

Two implementations: PyTorch operators, and the Triton kernels of MMFS. The kernels share one offset between the levels
and add a slot of logit 0 to the softmax. So each level is a separate call. Its result m_l and its denominator
e^d_l = 1 + S_l, where S_l is the sum of the exponentials, are combined to

    out = sum_l m_l e^d_l / sum_l (e^d_l - 1)           for a single level: m / (1 - e^-d)

The logits are shifted first, so that the largest is `_LARGEST`. Then S_l is in the thousands, and adding and
subtracting 1 does not lose precision.

Axes: B batch, S spatial positions of all levels, Q queries, N heads, V levels, P points, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .deformable import Shapes, deformable_attention
from .devices import chooses_kernels
from .mmfs_attention import Backend, MMFSInputs, mmfs_attention, why_not_triton

_LARGEST = 8.0


def deformable_attention_around(
    value: Tensor, shapes: Shapes, offsets: Tensor, logits: Tensor, reference: Tensor, backend: Backend = "auto"
) -> Tensor:
    """The weighted sum of samples of `value` around `reference`.

    Args:
        value: [B, S, N, D], the levels one after the other, each row-major.
        shapes: (height, width) of every level.
        offsets: [B, Q, N, V, P, 2] (x, y) in pixels of each level; float32 or float64.
        logits: [B, Q, N, V, P], of the same type.
        reference: [Q, 2] (x, y) in [0, 1]; the kernels compute no gradient for it.
        backend: "triton", "plain" or "auto", as in `mmfs_attention`. "auto": the kernels if the device is a CUDA device
            and they can run.

    Returns:
        [B, Q, N * D] in the type of `value`.

    Raises:
        ValueError: backend="triton", but the kernels cannot run.
    """
    fits = chooses_kernels(value.device) and why_not_triton(value, logits.shape[-1]) is None
    if backend == "triton" or (backend == "auto" and fits):
        return _by_level(value, shapes, offsets, logits, reference)
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    steps = [  # Python numbers: a tensor would have to be copied, which a CUDA graph cannot capture
        own / width if width == height else torch.stack([own[..., 0] / width, own[..., 1] / height], dim=-1)
        for own, (height, width) in zip(offsets.unbind(3), shapes, strict=True)
    ]
    locations = reference.to(offsets.dtype)[:, None, None, None] + torch.stack(steps, dim=3)
    return deformable_attention(value, shapes, locations, weights)


def _by_level(value: Tensor, shapes: Shapes, offsets: Tensor, logits: Tensor, reference: Tensor) -> Tensor:
    batch, queries, heads, _, points = logits.shape
    logits = logits - logits.detach().amax((-2, -1), keepdim=True) + _LARGEST
    images = torch.arange(batch, device=value.device)[:, None]
    table = offsets.new_zeros(1, heads * points * 2)
    maps = value.split([height * width for height, width in shapes], dim=1)
    mixed: Tensor | None = None
    total: Tensor | None = None
    for level, (shape, level_map) in enumerate(zip(shapes, maps, strict=True)):
        own = offsets[:, :, :, level].reshape(batch, queries, heads * points * 2)
        inputs = MMFSInputs(
            level_map, own, logits[:, :, :, level].reshape(batch, queries, heads * points), table,
            table[:, : heads * points], reference[None], images, [shape], [1.0],
        )  # fmt: skip
        part, left_out = mmfs_attention(inputs, backend="triton")
        if len(shapes) == 1:
            return (part / (1 - left_out[..., None])).flatten(2).to(value.dtype)
        denominator = 1 / left_out[..., None]
        part, own_total = part * denominator, denominator - 1
        mixed = part if mixed is None else mixed + part
        total = own_total if total is None else total + own_total
    assert mixed is not None
    assert total is not None
    return (mixed / total).flatten(2).to(value.dtype)
