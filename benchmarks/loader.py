"""How fast the data of a training run is made, without a model: rows, tokens and images a second.

python benchmarks/loader.py configs/debug.yaml --workers 0 1 2
python benchmarks/loader.py configs/small/pretrain.yaml --preset small --workers 7 14 --output loader.json

A training run whose steps do not wait for data shows only that this is enough; here is how much more there could be.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from mm_interleaved.bench.machine import describe
from mm_interleaved.configuration import load_config
from mm_interleaved.data import build_loader
from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.processor import Batch, MMInterleavedProcessor
from mm_interleaved.training.building import build_processor
from mm_interleaved.training.config import InitConfig, ModelConfig, TrainConfig


def measure(config: TrainConfig, processor: MMInterleavedProcessor, workers: int, seconds: float) -> dict[str, float]:
    """Rates after as many batches as fill the queues."""
    batches = iter(build_loader(replace(config.data, num_workers=workers), processor))
    for _ in islice(batches, max(1, workers * config.data.prefetch_factor)):
        pass
    rows = tokens = images = 0
    begin = time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        batch: Batch = next(batches)
        rows += len(batch.input_ids)
        tokens += int(batch.attention_mask.sum())
        images += len(batch.pixel_values)
    counts = {"rows": rows, "tokens": tokens, "images": images}
    return {"workers": workers, **{f"{name}/s": round(count / spent, 1) for name, count in counts.items()}}


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="of a training run")
    parser.add_argument("changes", nargs="*", help="key=value")
    parser.add_argument("--preset", help="of the model, in place of the configuration's")
    parser.add_argument("--workers", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of workers")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    config = load_config(options.config, TrainConfig, options.changes)
    given = ModelConfig(InitConfig(preset=options.preset)) if options.preset else config.model
    processor = build_processor(given, TOKENIZER)
    found = [measure(config, processor, workers, options.seconds) for workers in options.workers]
    for rates in found:
        print("  ".join(f"{name} {value:,}" for name, value in rates.items()))
    if options.output:
        report = {**describe(), "config": str(options.config), "changes": options.changes, "rates": found}
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
