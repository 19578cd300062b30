"""Capture of CUDA graphs, and a pool that leases them, so that a new generation call need not capture.

A captured step reads its inputs, its weights and its memory at the addresses of the capture, and runs no Python. So the
owner of a graph copies inputs into fixed tensors, and drops the graph if the state of its modules has changed
(`weights.state_of`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import nn

T = TypeVar("T")
_Key = tuple[Hashable, Hashable]  # the key of an object, and the state of the modules when it was made


def capture(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A function that replays `step` as a captured CUDA graph. `step` runs a few times first, on the current inputs."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):  # load kernels, make plans and workspaces
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), torch.no_grad():
        step()
    return graph.replay


class Pool(Generic[T]):
    """Leases objects that were made for a module, and keeps the most recently used ones.

    Args:
        size: number of objects to keep for each module.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._idle: weakref.WeakKeyDictionary[nn.Module, list[tuple[_Key, T]]] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()  # garbage collection may end a lease while this thread starts one

    @contextmanager
    def borrow(self, owner: nn.Module, key: Hashable, state: Hashable, make: Callable[[], T]) -> Iterator[T]:
        """Lease an object for `key` exclusively; objects of another `state` of the modules are dropped.

        The object must not refer to `owner`, or neither would be freed. It is made outside of inference mode, because
        tensors of inference mode cannot be written to outside of it.
        """
        wanted = (key, state)
        with self._lock:
            idle = [(k, x) for k, x in self._idle.pop(owner, []) if k[1] == state]
            ready = next((x for k, x in idle if k == wanted), None)
            idle = [(k, x) for k, x in idle if x is not ready]
            self._idle[owner] = (idle + self._idle.get(owner, []))[-self.size :]
        found = self._make(owner, make) if ready is None else ready
        try:
            yield found
        finally:
            with self._lock:
                idle = self._idle.setdefault(owner, [])
                idle.append((wanted, found))
                del idle[: -self.size]

    def _make(self, owner: nn.Module, make: Callable[[], T]) -> T:
        """A new object; if there is not enough memory, the kept ones are freed first."""
        with torch.inference_mode(False), torch.no_grad():
            try:
                return make()
            except torch.OutOfMemoryError:
                if not self._idle.pop(owner, None):
                    raise
            torch.cuda.empty_cache()
            return make()

    def clear(self) -> None:
        """Drop all objects."""
        self._idle.clear()
