"""The engine of a server without HTTP: 1, 8 and 32 clients that each wait for their answer.

    python benchmarks/serving_engine.py --preset release --device cuda --dtype bfloat16 --output serving-h200.json

Random weights. A text has 100 tokens after a prompt with one image, an image 30 steps, `mixed` one of each. The first
run of each case, in which steps are captured, is not measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from mm_interleaved import Document, GenerationSettings, Image, ImageSettings, Text, TextSettings
from mm_interleaved.bench.base import fresh
from mm_interleaved.bench.machine import describe
from mm_interleaved.serving import engine as events
from mm_interleaved.serving.engine import GenerationRequest
from mm_interleaved.serving.model import ModelEngine

WORDS = "the old house by the lake has a red door and a small garden in which two dogs sleep under a tree "


def request(kind: str, number: int, tokens: int, steps: int) -> GenerationRequest:
    """A request of a kind; every number has another prompt."""
    image = Image(PIL.Image.new("RGB", (448, 448), (number * 37 % 256, 90, 120)))
    given = [Text(f"{number} {WORDS * 3}"), image]
    slots = {"text": [Text()], "image": [Image()], "mixed": [Text(), Image()]}[kind]
    text = TextSettings(max_new_tokens=tokens, min_new_tokens=tokens, num_beams=1)
    settings = GenerationSettings(text, ImageSettings(num_inference_steps=steps, seed=number), seed=number)
    return GenerationRequest(Document([*given, *slots]), settings)


async def ask(engine: ModelEngine, asked: GenerationRequest) -> dict[str, Any]:
    """Times of one request."""
    begun, first, last, counted = time.perf_counter(), None, None, 0
    stream = await engine.submit(asked)
    async for event in stream:
        now = time.perf_counter()
        if isinstance(event, (events.TextDelta, events.ImageProgress)):
            first = first or now - begun
        if isinstance(event, events.TextDone):
            last = now - begun
        if isinstance(event, events.Done):
            counted = event.usage.output_images
    return {"first": first, "text": last, "whole": time.perf_counter() - begun, "images": counted}


async def case(
    engine: ModelEngine, kind: str, clients: int, rounds: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Throughput and times of so many clients."""
    before, begun = engine.load.tokens, time.perf_counter()

    async def client(name: int) -> list[dict[str, Any]]:
        numbers = range(name * rounds, (name + 1) * rounds)
        return [await ask(engine, request(kind, number, options.tokens, options.steps)) for number in numbers]

    found = [one for many in await asyncio.gather(*map(client, range(clients))) for one in many]
    seconds = time.perf_counter() - begun
    firsts = sorted(one["first"] for one in found if one["first"])
    result = {
        "kind": kind, "clients": clients, "requests": len(found), "seconds": round(seconds, 3),
        "tokens_s": round((engine.load.tokens - before) / seconds, 1),
        "images_s": round(sum(one["images"] for one in found) / seconds, 3),
        "requests_s": round(len(found) / seconds, 3), "first_s": round(statistics.median(firsts), 4),
        "whole_s": round(statistics.median(one["whole"] for one in found), 3),
    }  # fmt: skip
    gaps = [(one["text"] - one["first"]) / (options.tokens - 1) for one in found if one["text"]]
    if gaps and kind == "text":
        result["token_s"] = round(statistics.median(gaps), 5)
    if torch.cuda.is_available():
        result["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return result


async def measure(engine: ModelEngine, options: argparse.Namespace, write: Any) -> None:
    """All cases, each once before it is measured; written as they come."""
    await engine.start()
    results: list[dict[str, Any]] = []
    for clients in map(int, options.clients.split(",")):
        for kind in options.kinds.split(","):
            begun = time.perf_counter()
            await case(engine, kind, clients, 1, options)
            result = await case(engine, kind, clients, options.rounds, options)
            result["with_warm_up_s"] = round(time.perf_counter() - begun, 1)
            results.append(result)
            print(json.dumps(result), flush=True)
            write(results)
    await engine.stop(1.0)


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="debug")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--kinds", default="text,image,mixed")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2, help="requests of each client")
    parser.add_argument("--images-together", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024, help="most tokens of a row")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    begun = time.perf_counter()
    loaded = fresh(options.preset, torch.device(options.device), getattr(torch, options.dtype))
    most = max(map(int, options.clients.split(",")))
    engine = ModelEngine(loaded.model.eval(), loaded.processor, options.preset, rows=most, tokens=options.context,
                         images_together=options.images_together)  # fmt: skip
    print(
        f"ready after {time.perf_counter() - begun:.1f} s; a row takes {engine.row_bytes / 2**30:.2f} GiB", flush=True
    )

    def write(results: list[dict[str, Any]]) -> None:
        if options.output:
            settings = {name: value for name, value in vars(options).items() if name != "output"}
            about = {**describe(), "settings": settings, "results": results}
            options.output.write_text(json.dumps(about, indent=1) + "\n")

    asyncio.run(measure(engine, options, write))


if __name__ == "__main__":
    main()
