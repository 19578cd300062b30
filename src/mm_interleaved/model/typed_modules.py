"""Lists of modules whose elements have a type: PyTorch's `ModuleList` gives out plain modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)

if TYPE_CHECKING:

    class ModuleListOf(nn.ModuleList, Generic[M]):
        """A `ModuleList` of modules of class `M`, for type checkers only."""

        def __iter__(self) -> Iterator[M]: ...

        def __getitem__(self, idx: int) -> M: ...  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices


def module_list(modules: Iterable[M]) -> ModuleListOf[M]:
    """A `ModuleList` of `modules`, with their type."""
    return cast("ModuleListOf[M]", nn.ModuleList(modules))
