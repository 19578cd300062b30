"""Compiles the kernels of `group_norm_triton.py` for an H100 or H200, without one.

Run by `compile_all.py`.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mm_interleaved.ops import group_norm_triton as kernels

TARGET = GPUTarget("cuda", 90, 32)
MAPS, TABLES, SIXTEENS = ("x", "grad", "out"), ("table", "stats", "means"), ("pixels", "channels", "span")
MAP = {"BLOCK_N": kernels.TILE // kernels.WIDEST, "BLOCK_C": kernels.WIDEST}


def kind(name: str, of_map: str, of_weights: str) -> str:
    """Type of a kernel's argument."""
    if name in MAPS:
        return f"*{of_map}"
    if name in TABLES:
        return "*fp32"
    return {"weight": f"*{of_weights}", "bias": f"*{of_weights}", "eps": "fp32"}.get(name, "i32")


def compiled(kernel: Any, of_map: str = "fp32", of_weights: str = "fp32", **constants: Any) -> int:
    """Bytes of the program for the device; pointers and sizes are multiples of 16, as those of the release are."""
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in constants else kind(n, of_map, of_weights) for n in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    even = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in SIXTEENS or signature[n][0] == "*"}
    return len(triton.compile(ASTSource(kernel, signature, fixed, even), TARGET).asm["cubin"])


def sizes() -> dict[str, int]:
    """Compile all, and their sizes by name."""
    found = {"join": compiled(kernels._join_kernel, BLOCK_P=kernels.JOINED // 16, BLOCK_D=16)}
    for types in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16")):
        found[f"statistics {types}"] = compiled(kernels._statistics_kernel, *types, **MAP)
        for silu in (False, True):
            for name in ("norm", "sums", "gradient"):
                kernel = getattr(kernels, f"_{name}_kernel")
                found[f"{name} {types} {silu}"] = compiled(kernel, *types, SILU=silu, **MAP)
    return found
