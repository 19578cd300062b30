"""Gradient checkpointing: all activations are recomputed in the backward pass, or only those that are cheap."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..generation import MMInterleaved

PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})


def enable_checkpointing(model: MMInterleaved, selective: bool = False) -> None:
    """Keep only the inputs of layers, in every part that supports it.

    Args:
        model: the model.
        selective: whether to keep also the outputs of attention and MMFS, which are small and slow to compute, and
            every second matrix product. That saves a third of the extra arithmetic, for more memory.
    """
    settings: dict[str, Any] = {"use_reentrant": False} | ({"context_fn": _kept} if selective else {})
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.2x on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def disable_checkpointing(model: MMInterleaved) -> None:
    """Keep all activations."""
    new = hasattr(model, "activation_checkpointing_disable")
    (model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable)()


@cache
def _attention() -> frozenset[Any]:
    """The operators of PyTorch's attention and of MMFS."""
    names = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    found = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in names]
    return frozenset([*found, torch.ops.mm_interleaved.mmfs_attention.default])


def _kept() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of a layer: for its forward pass, which keeps tensors, and for the recomputation."""
    products = {False: 0, True: 0}  # matrix products so far, in the forward pass and in the recomputation

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in PRODUCTS:
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        else:
            keep = operation in _attention()
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
