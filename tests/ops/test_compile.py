"""All kernels compile for an H100 or H200 that is not here: the interpreter lets pass what the compiler would not."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mm_interleaved.ops.mmfs_attention import HAS_TRITON


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="there is no assembler")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(("program", "kernels"), [("kernels", 26), ("mmfs", 24), ("pointwise", 18), ("group_norm", 29)])
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path, program: str, kernels: int) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, Path(__file__).with_name(f"compile_{program}.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert len(sizes) == kernels
    assert all(size > 1000 for size in sizes.values())
