"""How fast scenes are drawn on one core.

python benchmarks/drawing.py --scenes 1000 --output benchmarks/results/drawing.json

Drawing is measured after the first scenes have filled the caches; sampling is what choosing them costs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from mm_interleaved.bench.machine import describe
from toyworld.draw import draw
from toyworld.sampling import random_scene, scene_rng

WARM_UP = 200  # scenes


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256], help="sides in pixels")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    scenes = [random_scene(scene_rng(0, "train", i), split="train") for i in range(options.scenes + WARM_UP)]
    found = {"sampling": round(len(scenes) / (time.perf_counter() - started))}
    for size in options.sizes:
        for scene in scenes[:WARM_UP]:
            draw(scene, size)
        started = time.perf_counter()
        for scene in scenes[WARM_UP:]:
            draw(scene, size)
        found[f"drawing at {size} px"] = round(options.scenes / (time.perf_counter() - started))
    for what, rate in found.items():
        print(f"{what:20} {rate:6} scenes/s")
    if options.output:
        report = {"machine": describe(), "scenes": options.scenes, "scenes per second": found}
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
