"""What stands beside every figure: the command, the machine, the versions."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path

import diffusers
import torch
import transformers

import mm_interleaved


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe() -> dict[str, object]:
    """For the head of a results file."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {m.__name__: m.__version__ for m in (mm_interleaved, torch, transformers, diffusers)}
    words = sys.argv[1:]
    if "--output" in words:  # where a result was put says nothing about it
        at = words.index("--output")
        words = words[:at] + words[at + 2 :]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
    return {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads",
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": versions,
    }
