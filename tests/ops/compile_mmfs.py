"""Compiles the kernels of MMFS for an H100 or H200, without one.

Run by `compile_all.py`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mm_interleaved.ops import mmfs_triton, mmfs_triton_backward, mmfs_triton_shared

TARGET = GPUTarget("cuda", 90, 32)
HEADS, POINTS, DIM = 16, 8, 64  # the release's
FLOATS = ("parts", "sums", "tops", "lse", "grad_lse", "reference", "offset_table_parts", "logit_table_parts")
HALVES = (
    "values", "offsets", "logits", "offset_table", "logit_table", "ignore", "mixed", "grad_mixed", "grad_values",
    "grad_offsets", "grad_logits",
)  # fmt: skip
TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def kind(name: str, half: str) -> str:
    """Type of a kernel's argument."""
    if name in HALVES:
        return f"*{half}"
    return "*i64" if name in ("images", "entries") else "*fp32" if name in FLOATS else "i32"


def compiled(kernel: Any, half: str, num_warps: int = 4, maxnreg: int | None = None, **constants: Any) -> int:
    """Bytes of the program for the device."""
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in constants else kind(n, half) for n in names} | {"bounds": "*i32"}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {n: signature[n] for n in names}, fixed)
    return len(triton.compile(source, TARGET, {"num_warps": num_warps, "maxnreg": maxnreg}).asm["cubin"])


def sizes() -> dict[str, int]:
    """Compile all at the sizes of the release, for tokens and for maps of queries; and their sizes by name."""
    found = {}
    for sides, half in (((32, 16, 8), "bf16"), ((64, 32, 16, 8), "bf16"), ((32, 16, 8), "fp16"), ((32, 16, 8), "fp32")):
        shapes, scales = tuple(x for side in sides for x in (side, side)), tuple(side / 8 for side in sides)
        shared = (15, HEADS, POINTS, DIM, shapes, scales)
        options = mmfs_triton_shared._options("forward", *shared)
        found[f"forward {len(sides)} {half}"] = compiled(mmfs_triton._forward_kernel, half, **options, IGNORE=True)
        fixed = {key: options[key] for key in (*mmfs_triton_shared.FIXED, "BLOCK_P", "BLOCK_D")}
        few = {"BLOCK_S": mmfs_triton.FEW_SLOTS, "PARTS": 24, "OVERLAP": True}
        found[f"few {len(sides)} {half}"] = compiled(mmfs_triton._few_kernel, half, **fixed, **few)
        joined = {"HEADS": HEADS, "DIM": DIM, "PARTS": 24, "ALL_PARTS": 32, "BLOCK_D": DIM, "IGNORE": True}
        found[f"join {len(sides)} {half}"] = compiled(mmfs_triton._join_kernel, half, **joined, OVERLAP=True)
        for kind in ("backward", "backward of few"):
            options = mmfs_triton_shared._options(kind, *shared)
            found[f"queries {kind} {len(sides)} {half}"] = compiled(
                mmfs_triton_backward._queries_kernel, half, **options, BLOCK_L=4, GRAD_LSE=True
            )
        fixed = {key: options[key] for key in mmfs_triton_shared.FIXED}
        tile = mmfs_triton_backward.value_tile([(side, side) for side in sides], DIM, 1)
        found[f"values {len(sides)} {half}"] = compiled(
            mmfs_triton_backward._values_kernel, half, **fixed, **tile, PRODUCT=TYPES[half]
        )
    return found
