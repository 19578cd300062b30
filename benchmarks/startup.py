"""What starting costs: help, an import, and the first event of a generation, each in a process of its own.

python benchmarks/startup.py --runs 5 --output startup.json
PYTHONPATH=OLD/src python benchmarks/startup.py ...      # another version of the package, for comparison
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

FIRST_EVENT = """
from mm_interleaved import Document, GenerationSettings, Text
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.pretrained import load

loaded = load("small")
generator = InterleavedGenerator(loaded.model, loaded.processor, GenerationSettings())
next(iter(generator.run([Document([Text("A fox."), Text()])])))
"""
CASES = {
    "mmi --help": "from mm_interleaved.cli import main; main(['--help'])",
    "mmi generate --help": "from mm_interleaved.cli import main; main(['generate', '--help'])",
    "mmi data --help": "from mm_interleaved.cli import main; main(['data', '--help'])",
    "import mm_interleaved": "import mm_interleaved",
    "import the model": "from mm_interleaved import MMInterleaved",
    "first event of a generation": FIRST_EVENT,
}


def seconds(code: str, runs: int) -> list[float]:
    """Wall-clock seconds of new processes that run `code`; the first, which fills the caches of files, is left out."""
    found = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        found.append(time.perf_counter() - start)
    return found[1:]


def main() -> None:
    """Measure every case, print it, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each case")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows = {}
    for name, code in CASES.items():
        times = seconds(code, options.runs)
        rows[name] = {"median": round(statistics.median(times), 3), "least": round(min(times), 3)}
        print(f"{name:30} {rows[name]['median']:7.2f} s   (least {rows[name]['least']:.2f})", flush=True)
    if options.output:
        about = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0)), "runs": options.runs}
        options.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
