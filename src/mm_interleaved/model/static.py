"""Work over tensors that never move: recorded once in a CUDA graph, kept for the next time, tied to the weights' place.

A recorded step reads its inputs, its weights and its memory where they were when it was recorded. So whoever records
one copies inputs into fixed tensors, and forgets it when the weights have moved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import nn

from .weights import stored

T = TypeVar("T")


def capture(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`step`, recorded in a CUDA graph; a call replays it. `step` runs a few times first, on whatever is there."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):  # kernels are loaded, plans and workspaces made
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), torch.no_grad():
        step()
    return graph.replay


def addresses(*modules: nn.Module) -> tuple[int, ...]:
    """Where the weights of `modules` lie."""
    return tuple(t.data_ptr() for module in modules for p in module.parameters() for t in stored(p))


class Pool(Generic[T]):
    """Things made for a module and kept for the next time, the most recently used ones.

    Args:
        size: how many to keep for each module.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._idle: weakref.WeakKeyDictionary[nn.Module, list[tuple[Hashable, T]]] = weakref.WeakKeyDictionary()

    @contextmanager
    def borrow(self, owner: nn.Module, key: Hashable, weights: tuple[int, ...], make: Callable[[], T]) -> Iterator[T]:
        """One made for `key`, for nobody else until the end; those made for weights elsewhere are dropped.

        What is made must not hold on to `owner`, or neither would ever be freed.
        """
        idle = self._idle.setdefault(owner, [])
        idle[:] = [(k, x) for k, x in idle if k[1] == weights]
        key = (key, weights)
        place = next((i for i, (k, _) in enumerate(idle) if k == key), None)
        found = self._make(idle, make) if place is None else idle.pop(place)[1]
        try:
            yield found
        finally:
            idle.append((key, found))
            del idle[: -self.size]

    @staticmethod
    def _make(idle: list[tuple[Hashable, T]], make: Callable[[], T]) -> T:
        """Another one; if there is no memory for it, in the place of those that are kept."""
        try:
            return make()
        except torch.OutOfMemoryError:
            if not idle:
                raise
        idle.clear()
        torch.cuda.empty_cache()
        return make()

    def clear(self) -> None:
        """Forget everything."""
        self._idle.clear()
