"""Memory and speed of each way to load a model for generation: types, quantizations, offloading.

    python benchmarks/quantization.py --preset release --device cuda --seconds 110 --output quantization-h200.json

Random weights. A text follows a prompt of 300 words and 5 images; an image follows 60 words and has 30 steps. Nothing
but the document is served. What is captured or compiled once is not measured, except with offloading, where a run
begins with copies in any case; `text_s` and `image_s` then have them, `token_ms` has not. A case that fails is recorded
with its error, and a case for which there is not enough time is left out.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from mm_interleaved import Document, GenerationSettings, Image, ImageSettings, Text, TextSettings
from mm_interleaved.bench.base import fresh
from mm_interleaved.bench.machine import describe
from mm_interleaved.checkpoints.quantization import quantize
from mm_interleaved.document import Segment
from mm_interleaved.generation import ContinuousGenerator
from mm_interleaved.generation.events import DocumentFinished
from mm_interleaved.model.offloading import offload
from mm_interleaved.pretrained import Loaded

CASES = "int4,nf4,int4+offload,bfloat16+offload,int8,fp8,bfloat16"
WORDS = "the old house by the lake has a red door and a small garden in which two dogs sleep under a tree "


def load(preset: str, device: torch.device, case: str) -> Loaded:
    """A model of that size, loaded as the case says."""
    kind, _, how = case.partition("+")
    loaded = fresh(preset, device, torch.float32 if kind == "float32" else torch.bfloat16)
    if kind not in ("float32", "bfloat16"):
        quantize(loaded.model, kind, device)  # pyright: ignore[reportArgumentType] -- checked there
    if how == "offload":
        offload(loaded.model, device)
    return loaded


def run(generator: ContinuousGenerator, segments: list[Segment], tokens: int, steps: int) -> tuple[float, list[float]]:
    """Seconds of a document, and the seconds between its steps."""
    text = TextSettings(max_new_tokens=tokens, min_new_tokens=tokens, num_beams=1)
    settings = GenerationSettings(text, ImageSettings(num_inference_steps=steps))
    begun, times, ended = time.perf_counter(), [], False
    generator.join("document", generator.prepare(Document(segments)), settings)
    while not ended:
        events = [event for _, event in generator.step()]
        ended = any(isinstance(event, DocumentFinished) for event in events)
        times.append(time.perf_counter())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    generator.reset()
    return time.perf_counter() - begun, [b - a for a, b in itertools.pairwise(times)]


def measure(preset: str, device: torch.device, case: str, tokens: int, steps: int) -> dict[str, Any]:
    """Memory and times of a case."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    begun = time.perf_counter()
    loaded = load(preset, device, case)
    gc.collect()
    found: dict[str, Any] = {"case": case, "load_s": round(time.perf_counter() - begun, 2)}
    if cuda:
        torch.cuda.empty_cache()  # what making the weights took
        torch.cuda.reset_peak_memory_stats()
        found["weights_gib"] = round(torch.cuda.memory_allocated() / 2**30, 2)
    side = loaded.model.config.vision_config.image_size
    images = [Image(PIL.Image.new("RGB", (side, side), (40 * n, 90, 120))) for n in range(5)]
    context = min(2048, loaded.model.context_length)
    generator = ContinuousGenerator(loaded.model, loaded.processor, 1, tokens=context)
    prompt, short = [Text(WORDS * (15 if context == 2048 else 2)), *images, Text()], [Text(WORDS * 3), Image()]
    if not case.endswith("offload"):
        run(generator, prompt, 8, steps)
        run(generator, short, 8, 3)
    seconds, gaps = run(generator, prompt, tokens, steps)
    found |= {"text_s": round(seconds, 3), "token_ms": round(1000 * statistics.median(gaps), 3)}
    found["tokens_per_s"] = round(1000 / found["token_ms"], 1)
    seconds, gaps = run(generator, short, tokens, steps)
    found |= {"image_s": round(seconds, 3), "step_ms": round(1000 * statistics.median(gaps), 2),
              "images_per_s": round(1 / seconds, 3)}  # fmt: skip
    if cuda:
        found["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return found


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="debug")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", default=CASES, help="in this order; KIND or KIND+offload")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=600, help="no case begins that would end later")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device, begun, longest = torch.device(options.device), time.perf_counter(), 0.0
    results: list[dict[str, Any]] = []
    for case in options.cases.split(","):
        at = time.perf_counter()
        if at - begun + longest > options.seconds:
            results.append({"case": case, "left_out": "no time"})
        else:
            try:
                results.append(measure(options.preset, device, case, options.tokens, options.steps))
            except Exception as error:  # of torchao or of the device: the other cases go on
                logging.exception(case)
                results.append({"case": case, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
            longest = max(longest, time.perf_counter() - at)
        gc.collect()
        print(json.dumps(results[-1]), f"after {time.perf_counter() - begun:.0f} s", flush=True)
        if options.output:
            settings = {name: str(value) for name, value in vars(options).items()}
            about = {**describe(), "settings": settings, "results": results}
            options.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
