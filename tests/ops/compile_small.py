"""Compiles the kernels of `toyworld.small` for an H100 or H200, without one.

Run by `compile_all.py`.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from toyworld.small import kernels

TARGET = GPUTarget("cuda", 90, 32)
KINDS = {
    "x": "*bf16", "y": "*bf16", "weight": "*bf16", "bias": "*bf16", "grad": "*bf16", "of_x": "*bf16", "eps": "fp32",
    "of_weight": "*fp32", "of_bias": "*fp32", "rows": "i32", "planes": "*fp32", "plane_of": "*i32", "atlas": "*fp32",
    "starts": "*i32", "layers": "*fp32", "offsets": "*i32",
}  # fmt: skip


def compiled(kernel: Any, constants: dict[str, Any], out: str = "*fp32") -> int:
    """Bytes of the program for the device."""
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in constants else out if n == "out" else KINDS[n] for n in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    return len(triton.compile(ASTSource(kernel, signature, fixed), TARGET).asm["cubin"])


def sizes() -> dict[str, int]:
    """Compile all, and their sizes by name."""
    found = {"compose": compiled(kernels.compose_tiles, {"SIZE": 128, "COLUMNS": 11, "TILE": 32}, "*u8")}
    found["rows"] = compiled(kernels.add_rows, {"D": 192, "BLOCK_R": 8, "BLOCK_D": 256})
    for width in (16, 128):
        block = {"D": width, "BLOCK_R": 2048 // width, "BLOCK_D": width}
        for centred in (True, False):
            found[f"norm {width} {centred}"] = compiled(kernels.norm_forward, {**block, "CENTRED": centred})
            found[f"gradient {width} {centred}"] = compiled(kernels.norm_backward, {**block, "CENTRED": centred})
    return found
