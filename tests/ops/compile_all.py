"""Compiles all kernels for a GPU that is not here, and prints the sizes of their programs by file.

A program of its own, because Triton decides for the interpreter when it is imported.
"""

from __future__ import annotations

import json

from . import compile_group_norm, compile_kernels, compile_mmfs, compile_pointwise, compile_small

if __name__ == "__main__":
    modules = (compile_kernels, compile_mmfs, compile_pointwise, compile_group_norm, compile_small)
    print(json.dumps({module.__name__.rpartition("compile_")[2]: module.sizes() for module in modules}))
