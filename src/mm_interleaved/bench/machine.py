"""The description of a measurement: command, machine, versions; and the clock."""

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
    """The description for the head of a results file."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: version(name) for name in ("mm-interleaved", "torch", "transformers", "diffusers")}
    words = sys.argv[1:]
    if "--output" in words:  # the output file is left out of the command
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
    """The speed of a machine: bytes per second of a copy, and operations per second of matrix products."""

    bytes_per_second: float
    operations_per_second: float


class Clock:
    """Measures time and memory of work on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reserved = 0  # maximum so far, because `peak` resets the device's statistics

    def __call__(self) -> float:
        """The time in seconds, after a synchronisation."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, work: Callable[[], object], repeats: int = 3, warm_up: int = 1) -> float:
        """The shortest time of some repeats, in seconds."""
        best = float("inf")
        for number in range(warm_up + repeats):
            begin = self()
            work()
            best = best if number < warm_up else min(best, self() - begin)
        return best

    def peak(self, work: Callable[[], object]) -> int | None:
        """The additional bytes that a call needs; None on a CPU."""
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
        """Reset the maximum of `reserved`."""
        if self.device.type == "cuda":
            self._reserved = 0
            torch.cuda.reset_peak_memory_stats()

    def reserved(self) -> int | None:
        """The most bytes that the process held on the device since `reset_reserved`; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return max(self._reserved, torch.cuda.max_memory_reserved())

    def speed(self, dtype: torch.dtype) -> Speed:
        """The speed of the machine, measured with a large copy (read and write) and a large product."""
        size = 2**32 if self.device.type == "cuda" else 2**27
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        copy = self.time(lambda: target.copy_(source))
        side = 8192 if self.device.type == "cuda" else 1024
        a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        product = self.time(lambda: a @ b)
        return Speed(2 * size / copy, 2 * side**3 / product)
