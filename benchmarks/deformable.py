"""Deformable attention on a CPU without gradients: sums of rows beside samples of maps.

python benchmarks/deformable.py --threads 1 2 --output benchmarks/results/deformable-cpu.json

Milliseconds, the best of several, the two forms in turn; below a ratio of 1 the rows are slower.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mm_interleaved.bench.machine import describe
from mm_interleaved.ops.deformable import sample_maps, sum_rows

# (images, queries, heads, channels of a head, points, sides of the maps)
CASES = [
    (2, 64, 8, 16, 4, (32, 16, 8, 4)),
    (2, 256, 8, 16, 4, (32, 16, 8, 4)),
    (2, 1024, 8, 16, 4, (32, 16, 8, 4)),
    (20, 100, 8, 16, 4, (16, 8, 4)),
    (20, 1, 8, 16, 4, (16, 8, 4)),
    (2, 4096, 16, 64, 8, (64, 32, 16, 8)),
    (2, 4096, 4, 4, 8, (64, 32, 16, 8)),
]


def best(work: Callable[[], torch.Tensor], repeats: int) -> float:
    """Milliseconds of the quickest run, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return round(1e3 * min(times), 3)


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only so many, the first ones")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    lines = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for images, queries, heads, channels, points, sides in CASES[: options.cases]:
            value = torch.randn(images, sum(side * side for side in sides), heads, channels)
            locations = 1.4 * torch.rand(images, queries, heads, 1, points, 2) - 0.2
            weights = torch.rand(images, queries, heads, len(sides), points)
            given = value, [(side, side) for side in sides], locations, weights
            with torch.inference_mode():
                maps, rows = (best(partial(form, *given), options.repeats) for form in (sample_maps, sum_rows))
            case = f"{images} x {queries} queries, {heads} heads of {channels}, {points} points, maps {sides}"
            lines.append({"threads": threads, "case": case, "maps": maps, "rows": rows, "ratio": round(maps / rows, 2)})
            print(f"{threads} threads  {case}: maps {maps} ms, rows {rows} ms, {maps / rows:.2f} times as fast")
    if options.output:
        options.output.write_text(json.dumps({**describe(), "milliseconds": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
