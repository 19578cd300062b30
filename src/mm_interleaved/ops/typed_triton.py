"""Triton's decorator and whole-number functions under types of their own.

Triton annotates a kernel as the Python function that it is made from, without options of a launch and with compile-time
numbers as `constexpr`, and lets functions of whole numbers return a `constexpr`, which they do in kernels alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import triton

jit = cast("Callable[[Callable[..., Any]], Any]", triton.jit)
cdiv = cast("Callable[[int, int], int]", triton.cdiv)
next_power_of_2 = cast("Callable[[int], int]", triton.next_power_of_2)
