"""How fast tasks go: samples a second by size of batch, and how much of the time is spent in the model.

python benchmarks/evaluation.py --output benchmarks/results/evaluation.json                     # one GPU with 80 GB
python benchmarks/evaluation.py --preset debug --device cpu --dtype float32 --samples 8         # to see that it runs

Weights are random: what is written means nothing and costs the same. Images are toy images of 640 pixels, read from
files as an evaluation reads them; prompts, beams and lengths are the release's. A run has eight batches at least, as
the first one waits for its images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from mm_interleaved.bench.base import fresh
from mm_interleaved.bench.machine import describe
from mm_interleaved.evaluation import TaskSuite
from mm_interleaved.evaluation.predict import Predictor, plan_batches, run_batches
from mm_interleaved.evaluation.predictions import Predictions
from mm_interleaved.pretrained import Loaded
from mm_interleaved.tasks import TaskConfig, make_task
from toyworld.writers import write_dataset
from toyworld.writers.base import Job

TASKS = {"coco_karpathy": "coco", "vqav2": "vqav2"}
SIDE = 640  # pixels, COCO's
BATCHES = 8  # at least
say = Console(stderr=True).print


def measure(loaded: Loaded, config: TaskConfig, batch_size: int, samples: int, folder: Path) -> dict[str, float]:
    """Speed of one task; a batch goes first and does not count."""
    task = make_task(config)
    suite = TaskSuite([config], batch_size=batch_size)
    predictor = Predictor(loaded.model, loaded.processor, task, suite)
    asked = list(task.samples())[: max(samples, BATCHES * batch_size)]
    batches = plan_batches(asked, batch_size)
    for name, part in (("warm", batches[:1]), ("timed", batches)):
        predictions = Predictions(folder / f"{config.task}-{batch_size}-{name}")
        predictions.prepare(lambda count: {"samples": {"count": len(asked)}})
        speed = run_batches(predictor, asked, part, {}, predictions)
    return {"batch_size": batch_size, **speed.to_dict()}


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="release")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--samples", type=int, default=64, help="of each task, at least")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    loaded = fresh(options.preset, torch.device(options.device), getattr(torch, options.dtype))
    result: dict[str, object] = describe()
    with tempfile.TemporaryDirectory() as name:
        for task, form in TASKS.items():
            data = Path(name) / form
            most = max(options.samples, BATCHES * max(options.batches))
            write_dataset(form, data, Job(most, "val", 0, SIDE))
            config = TaskConfig(task, images=str(data), annotations=str(data), phase="val")
            rows = []
            for size in options.batches:
                rows.append(measure(loaded, config, size, options.samples, Path(name)))
                say(f"{task}, {size} together: {rows[-1]['samples_per_second']:.2f} samples/s, "
                    f"{rows[-1]['model_share']:.0%} in the model")  # fmt: skip
            result[task] = rows
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
