"""Compiles the kernels of `pointwise_triton.py` for an H100 or H200, without one.

Run by `compile_all.py`.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mm_interleaved.ops import pointwise_triton as kernels

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = ("query", "key", "query_out", "key_out", "cos", "sin", "gate", "up", "out", "grad", "grad_gate", "grad_up",
            "both", "grad_both")  # fmt: skip


def compiled(kernel: Any, kind: str, warps: int = 4, **constants: Any) -> int:
    """Bytes of the program for the device."""
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in constants else f"*{kind}" if n in POINTERS else "i32" for n in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    return len(triton.compile(ASTSource(kernel, signature, fixed), TARGET, {"num_warps": warps}).asm["cubin"])


def sizes() -> dict[str, int]:
    """Compile all at the sizes of the release, and their sizes by name."""
    found = {}
    for kind in ("bf16", "fp16", "fp32"):
        for inverse in (False, True):
            found[f"rotary {kind} {inverse}"] = compiled(
                kernels._rotary_kernel, kind, 2, INVERSE=inverse, HEADS=40, KEY_HEADS=8, HALF=64, BLOCK_H=8, BLOCK_D=64
            )
        found[f"gate {kind}"] = compiled(kernels._gate_kernel, kind, BLOCK=kernels.ELEMENTS)
        found[f"gate backward {kind}"] = compiled(kernels._gate_backward_kernel, kind, BLOCK=kernels.ELEMENTS)
        block = {"BLOCK_R": kernels.ROWS, "BLOCK_C": kernels.COLUMNS}
        found[f"gelu {kind}"] = compiled(kernels._gelu_gate_kernel, kind, **block)
        found[f"gelu backward {kind}"] = compiled(kernels._gelu_gate_backward_kernel, kind, **block)
    return found
