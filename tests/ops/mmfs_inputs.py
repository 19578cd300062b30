"""Random arguments of `mmfs_attention`, and both of its forms run on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_interleaved.ops import MMFSInputs, mmfs_attention

LEAVES = ("values", "offsets", "logits", "offset_table", "logit_table")
SQUARE = [(4, 4), (2, 2)]
Arguments = dict[str, Any]


def visible_images(groups: int, slots: int, images: int, generator: torch.Generator) -> Tensor:
    """[groups, slots] of random images; group 0 sees as many as there is room for, others any number of them."""
    counts = torch.randint(0, slots + 1, (groups,), generator=generator)
    counts[0] = min(slots, images)
    visible = torch.stack([torch.randint(0, images, (slots,), generator=generator) for _ in range(groups)])
    return torch.where(torch.arange(slots) < counts[:, None], visible, -1)


def arguments(
    groups: int = 3,
    queries: int = 1,
    images: int = 2,
    slots: int = 2,
    shapes: list[tuple[int, int]] = SQUARE,
    heads: int = 2,
    points: int = 2,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Arguments:
    """Small enough for the interpreter, and more than one of everything that the kernels count."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    positions, levels = sum(h * w for h, w in shapes), len(shapes)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "values": draw(images, positions, heads, dim),
        "offsets": 2 * draw(groups, queries, heads * points * 2),
        "logits": draw(groups, queries, heads * levels * points),
        "offset_table": draw(slots, heads * points * 2),
        "logit_table": draw(slots, heads * levels * points),
        "reference": torch.rand(1, queries, 2, generator=generator, dtype=torch.float64).to(device, work),
        "images": visible_images(groups, slots, images, generator).to(device),
        "shapes": shapes,
        "scales": [w / shapes[-1][1] for _, w in shapes],
    }


def cast(given: Arguments, dtype: torch.dtype) -> Arguments:
    """The same numbers in another type."""
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}


def run(given: Arguments, backend: str) -> dict[str, Tensor]:
    """Both results, and the gradients of a random sum of them."""
    leaves = {k: given[k].detach().clone().requires_grad_() for k in LEAVES}
    mixed, ignored = mmfs_attention(MMFSInputs(**(given | leaves)), backend=backend)
    generator = torch.Generator().manual_seed(1)
    loss = mixed.new_zeros(())
    for x in (mixed, ignored):
        loss = loss + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
    loss.backward()
    zeros = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}
    return {"mixed": mixed.detach(), "ignored": ignored.detach()} | zeros


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))
