"""Compiles the kernels of decoding for an H100 or H200, without one: the interpreter lets pass what may not compile.

Run by `compile_all.py`.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mm_interleaved.ops import decoding_triton as kernels

TARGET = GPUTarget("cuda", 90, 32)
WIDTH = 5120  # the release's
FLOATS = ("parts", "sums", "tops")
NUMBERS = ("outputs", "rows", "x_row", "capacity", "query_row", "key_row", "value_row", "cos_row", "sin_row")


def kind(name: str, weights: str) -> str:
    """Type of a kernel's argument."""
    if name.startswith("weight") or name in ("gate", "up"):
        return f"*{weights}"
    if name in ("source", "columns"):
        return "*i64"
    if name in FLOATS or ("scale" in name and name != "scale" and weights != "bf16"):
        return "*fp32"
    if name in ("eps", "scale"):
        return "fp32"
    return "i32" if name in NUMBERS or name.startswith(("size", "blocks")) else "*bf16"


def compiled(kernel: Any, weights: str, tile: str | None, **constants: Any) -> int:
    """Bytes of the program for the device, in a tile of `decoding_triton.TILE` if it is a product."""
    warps = 4
    if tile is not None:
        constants["BLOCK_N"], constants["BLOCK_K"], warps = kernels.TILE[tile]
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in constants else kind(n, weights) for n in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    return len(triton.compile(ASTSource(kernel, signature, fixed), TARGET, {"num_warps": warps}).asm["cubin"])


def sizes() -> dict[str, int]:
    """Compile all, and their sizes by name."""
    found = {}
    for rows, kind_of_tile in ((1, "map"), (1, "maps"), (16, "rows")):
        for weights in ("bf16", "i8", "fp8e4nv"):
            shared = {"INPUTS": WIDTH, "SCALED": weights != "bf16", "ROWS": rows, "OVERLAP": rows == 1}
            maps, name = 1 if kind_of_tile == "map" else 3, f"{kind_of_tile} {weights}"
            for bias, residual in ((False, False), (True, True)):
                options = {"MAPS": maps, "NORM": not residual, "BIAS": bias, "RESIDUAL": residual, **shared}
                found[f"{name} {bias}"] = compiled(kernels._project_kernel, weights, kind_of_tile, **options)
            if kind_of_tile != "map":
                gated = "gated" if rows == 1 else "rows"
                found[f"gated {name}"] = compiled(kernels._gated_kernel, weights, gated, **shared)
    for name, shared in (("attend", False), ("attend to shared columns", True)):
        found[name] = compiled(kernels._attend_kernel, "bf16", None, HEADS=40, GROUP=1, DIM=128, SPLITS=32,
                               SHARED=shared, BLOCK_C=kernels.COLUMNS, BLOCK_D=128, OVERLAP=True)  # fmt: skip
    found["join"] = compiled(kernels._join_kernel, "bf16", None, DIM=128, SPLITS=32, BLOCK_D=128, OVERLAP=True)
    return found
