"""Muon: the update of a matrix is the orthogonal matrix nearest to its momentum, with equal size in all directions.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; for the size of updates Liu et al. 2025
(arXiv 2502.16982), eq. 4. `torch.optim.Muon` does the same one matrix at a time. Here matrices of equal shape are one
batch, because launching kernels dominates in small models, and convolution kernels count as matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, Jordan et al.
_ITERATIONS = 5


class Muon(torch.optim.AdamW):
    """Muon for the groups that have a `momentum`, AdamW for all others.

    Args:
        groups: parameter groups as in PyTorch. A group with `momentum` (of the running mean of gradients) and `scale`
            (root mean square of an update, in learning rates) is updated by Muon; its parameters have at least two
            axes, of which the first is the rows of the matrix and the others its columns.
        settings: settings of AdamW for the other groups.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of everything that has a gradient."""
        matrices = [group for group in self.param_groups if "momentum" in group]
        kept = {p: p.grad for group in matrices for p in group["params"]}
        for p in kept:
            p.grad = None  # so that AdamW skips it
        result = super().step(closure)
        for p, gradient in kept.items():
            p.grad = gradient
        for group in matrices:
            self._update(group)
        return result

    def _update(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                alike[p.shape[0], p.shape[1:].numel()].append(p)
        for (rows, columns), parameters in alike.items():
            for p in parameters:
                if not self.state[p]:  # AdamW does not load a state without "step"
                    self.state[p] |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(p)}
            gradients = [p.grad for p in parameters if p.grad is not None]
            means = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, means, group["momentum"])  # Nesterov momentum
            updates = _orthogonal_updates(ahead, rows, columns)
            size = group["scale"] * max(rows, columns) ** 0.5
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"] * size)


def _orthogonal_updates(ahead: Sequence[Tensor], rows: int, columns: int) -> list[Tensor]:
    """The orthogonal matrices nearest to tensors of one shape, in their shapes, types and divisions over processes.

    Tensors that FSDP divides by rows are exchanged, so that each process gets whole matrices, but only a part of them.
    """
    first = ahead[0]
    if not isinstance(first, DTensor):
        found = orthogonal(torch.stack([x.reshape(rows, columns) for x in ahead]))
        return [x.view_as(p) for x, p in zip(found.to(first), ahead, strict=True)]
    mesh = first.device_mesh
    own = torch.stack([x.to_local().reshape(-1, columns) for x in cast("Sequence[DTensor]", ahead)])
    shape = torch.Size([len(ahead), rows, columns])
    stride = (rows * columns, columns, 1)
    divided = DTensor.from_local(own, mesh, [Shard(1)], run_check=False, shape=shape, stride=stride)
    whole = divided.redistribute(placements=[Shard(0)]).to_local()
    found = orthogonal(whole) if len(whole) else whole
    again = DTensor.from_local(found.to(first.dtype), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    parts = again.redistribute(placements=[Shard(1)]).to_local()
    return [
        DTensor.from_local(
            part.reshape(x.to_local().shape), mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
        )
        for part, x in zip(parts, cast("Sequence[DTensor]", ahead), strict=True)
    ]


def orthogonal(matrices: Tensor) -> Tensor:
    """Approximately U V^T of each of `matrices` [batch, rows, columns] = U S V^T, with singular values of 0.7 to 1.2.

    Computed in bfloat16 on a GPU, which is precise enough.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
