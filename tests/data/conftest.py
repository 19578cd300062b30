"""Toy-world data sets in the official layouts."""

from ..tasks.conftest import toy_task, written

__all__ = ["toy_task", "written"]
