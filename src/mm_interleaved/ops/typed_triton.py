"""Triton's `jit` and integer functions with correct type annotations.

Triton types a kernel as the Python function under the decorator, without launch options and with compile-time numbers
as `constexpr`, and types integer functions as if they always returned `constexpr`, which they do in kernels only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import triton

jit = cast("Callable[[Callable[..., Any]], Any]", triton.jit)
cdiv = cast("Callable[[int, int], int]", triton.cdiv)
next_power_of_2 = cast("Callable[[int], int]", triton.next_power_of_2)
