"""What stands beside every figure: the command, the machine, the versions."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe() -> dict[str, object]:
    """For the head of a results file."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: version(name) for name in ("mm-interleaved", "torch", "transformers", "diffusers")}
    words = sys.argv[1:]
    if "--output" in words:  # where a result was put says nothing about it
        at = words.index("--output")
        words = words[:at] + words[at + 2 :]
    program = Path(sys.argv[0]).name
    begin = ["mmi"] if program in ("mmi", "__main__.py") else ["python", f"benchmarks/{program}"]
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join([*begin, *words]),
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads",
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": versions,
    }


@dataclass
class Speed:
    """What a machine can do at best: bytes moved a second, and operations of matrix products a second."""

    bytes_per_second: float
    operations_per_second: float


class Clock:
    """Seconds on a device, and the memory that work needs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reserved = 0  # most so far, as `peak` resets the device's own statistics

    def __call__(self) -> float:
        """Now, after everything before has happened."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, work: Callable[[], object], repeats: int = 3, warm_up: int = 1) -> float:
        """The fastest of some repeats, in seconds."""
        best = float("inf")
        for number in range(warm_up + repeats):
            begin = self()
            work()
            best = best if number < warm_up else min(best, self() - begin)
        return best

    def peak(self, work: Callable[[], object]) -> int | None:
        """Bytes that a call needs beyond what was there; None on a CPU."""
        if self.device.type != "cuda":
            work()
            return None
        torch.cuda.synchronize()
        self._reserved = max(self._reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def reset_reserved(self) -> None:
        """Begin anew to look for the most memory that the process holds on the device."""
        if self.device.type == "cuda":
            self._reserved = 0
            torch.cuda.reset_peak_memory_stats()

    def reserved(self) -> int | None:
        """Most bytes that the process held on the device since `reset_reserved`; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return max(self._reserved, torch.cuda.max_memory_reserved())

    def speed(self, dtype: torch.dtype) -> Speed:
        """Measured: a large copy, which reads and writes, and a large product."""
        size = 2**32 if self.device.type == "cuda" else 2**27
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        copy = self.time(lambda: target.copy_(source))
        side = 8192 if self.device.type == "cuda" else 1024
        a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        product = self.time(lambda: a @ b)
        return Speed(2 * size / copy, 2 * side**3 / product)
