"""A server under load: every answer is compared with one that was computed beforehand, alone.

    python benchmarks/serving.py --model small --clients 32 --seconds 60
    python benchmarks/serving.py --model small --compare 1,16 --kinds text,image,mixed --requests 48
    python benchmarks/serving.py --url http://127.0.0.1:8000 --clients 32 --seconds 600

Clients ask again as soon as they have an answer. Some of them leave in mid-stream (`--leave`); their requests are not
counted. The first form checks answers under load; `--compare` measures throughput by the number of clients.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import PIL.Image
import psutil

PROMPTS = (
    "A small red ball lies on the grass.", "A blue house stands by a lake.", "A yellow star is above a green box.",
    "A dog sleeps in the sun.", "There is a purple boat on the sea.", "Two trees stand on a hill.",
)  # fmt: skip
MOST_DIFFERENCE = 3  # of a value of a pixel, of 255: matrix products of other sizes round differently


@dataclass
class Job:
    """A request and its answer.

    Attributes:
        kind: `text`, `image`, or `mixed` (a text, then an image).
        body: the request.
        texts, images: the answer that it gets alone.
    """

    kind: str
    body: dict[str, Any]
    texts: list[str] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)


@dataclass
class Answer:
    """What a client got.

    Attributes:
        first, seconds: time to the first text or denoising step, and to the end.
        problem: what was wrong; "": nothing.
    """

    kind: str
    first: float
    seconds: float
    problem: str = ""


@dataclass
class Summary:
    """The answers of a run."""

    clients: int
    answers: int = 0
    wrong: int = 0
    refused: int = 0
    left: int = 0
    seconds: float = 0.0
    per_second: dict[str, float] = field(default_factory=dict)
    first: dict[str, list[float]] = field(default_factory=dict)
    whole: dict[str, list[float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)


def make_jobs(kinds: list[str], count: int, steps: int, tokens: int) -> list[Job]:
    """Jobs with different prompts and seeds, the kinds in turn."""
    jobs = []
    for number in range(count):
        kind, prompt = kinds[number % len(kinds)], PROMPTS[number % len(PROMPTS)]
        body = {"input": prompt, "seed": number, "num_inference_steps": steps, "max_output_tokens": tokens,
                "min_output_tokens": tokens // 2, "temperature": 0, "store": False, "stream": True}  # fmt: skip
        if kind == "text":
            body["tool_choice"] = "none"
        elif kind == "image":
            body["tool_choice"] = {"type": "image_generation"}
        else:
            body |= {"max_tool_calls": 1}
        jobs.append(Job(kind, body))
    return jobs


async def ask(
    client: httpx2.AsyncClient, job: Job, leave_after: int | None = None
) -> tuple[Answer, list[str], list[Any]]:
    """Send a request; the answer, its texts and its images. After `leave_after` events the client leaves."""
    begun, first, texts, images, end, seen = time.monotonic(), None, [], [], "", 0
    async with client.stream("POST", "/v1/responses", json=job.body) as response:
        if response.status_code != 200:
            await response.aread()
            return Answer(job.kind, 0.0, time.monotonic() - begun, f"status {response.status_code}"), [], []
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line[6:])
            seen += 1
            if first is None and event["type"] == "response.output_item.added":
                first = time.monotonic() - begun
            if event["type"] == "response.output_item.done":
                item = event["item"]
                if item["type"] == "message":
                    texts.append(item["content"][0]["text"])
                else:
                    images.append(np.asarray(PIL.Image.open(BytesIO(base64.b64decode(item["result"])))).astype(int))
            if event["type"] in ("response.completed", "response.incomplete", "response.failed"):
                end = event["type"]
            if leave_after is not None and seen >= leave_after:
                break
    problem = (
        ""
        if end in ("response.completed", "response.incomplete") or leave_after
        else f"it ended with {end or 'nothing'}"
    )
    return Answer(job.kind, first or 0.0, time.monotonic() - begun, problem), texts, images


def compare(job: Job, texts: list[str], images: list[Any]) -> str:
    """What differs from the answer that the job gets alone; "": nothing."""
    if texts != job.texts:
        return f"texts {texts} instead of {job.texts}"
    if len(images) != len(job.images):
        return f"{len(images)} images instead of {len(job.images)}"
    apart = max((int(np.abs(a - b).max()) for a, b in zip(images, job.images, strict=True)), default=0)
    return f"an image differs by {apart} of 255" if apart > MOST_DIFFERENCE else ""


async def load(url: str, jobs: list[Job], clients: int, seconds: float | None, requests: int | None, leave: float,
               process: int | None) -> Summary:  # fmt: skip
    """Let clients ask for a time, or for a number of requests in all."""
    found, numbers = Summary(clients), iter(range(requests or 10**9))
    begun = time.monotonic()
    answers: list[Answer] = []

    async def client_loop(name: int) -> None:
        generator = np.random.default_rng(name)
        async with httpx2.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
            while seconds is None or time.monotonic() - begun < seconds:
                number = next(numbers, None)
                if number is None:
                    return
                job = jobs[number % len(jobs)]
                leaves = generator.random() < leave
                answer, texts, images = await ask(client, job, int(generator.integers(2, 12)) if leaves else None)
                if leaves:
                    found.left += 1
                    continue
                if answer.problem == "status 429":
                    found.refused += 1
                    await asyncio.sleep(0.2)
                    continue
                answer.problem = answer.problem or compare(job, texts, images)
                answers.append(answer)

    async def watch() -> None:
        while process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.memory_mib.append(round(psutil.Process(process).memory_info().rss / 2**20))
            await asyncio.sleep(5)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(client_loop(name) for name in range(clients)))
    watcher.cancel()
    found.seconds = time.monotonic() - begun
    found.answers, found.wrong = len(answers), sum(bool(a.problem) for a in answers)
    found.problems = sorted({a.problem for a in answers if a.problem})[:10]
    for kind in sorted({a.kind for a in answers}):
        own = [a for a in answers if a.kind == kind]
        found.per_second[kind] = round(len(own) / found.seconds, 3)
        found.first[kind], found.whole[kind] = quantiles([a.first for a in own]), quantiles([a.seconds for a in own])
    return found


def quantiles(values: list[float]) -> list[float]:
    """The median and the 95th percentile."""
    ordered = sorted(values)
    return [round(statistics.median(ordered), 3), round(ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)], 3)]


@contextlib.contextmanager
def server(options: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """The address of the server and its process; one is started if no address was given."""
    if options.url:
        yield options.url, None
        return
    import subprocess

    rows = str(max(options.rows, 1))
    command = [sys.executable, "-m", "mm_interleaved", "serve", "--model", options.model, "--port", str(options.port),
               "--device", options.device, *(["--dtype", options.dtype] if options.dtype else []), f"rows={rows}",
               f"waiting={max(options.clients * 2, 64)}", f"images_together={options.images_together}",
               "limits.output_tokens=2048"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{options.port}"
    try:
        for _ in range(1200):
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit("the server did not start")
            time.sleep(0.5)
        yield url, process.pid
    finally:
        process.terminate()
        threading.Timer(60, process.kill).start() if process.poll() is None else None
        process.wait()


async def run(options: argparse.Namespace, url: str, process: int | None) -> dict[str, Any]:
    """Compute the answers, then measure."""
    kinds = options.kinds.split(",")
    results: dict[str, Any] = {}
    async with httpx2.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        jobs = make_jobs(kinds, options.jobs, options.steps, options.tokens)
        for job in jobs:
            answer, job.texts, job.images = await ask(client, job)
            if answer.problem:
                raise SystemExit(f"a request alone failed: {answer.problem}")
    print(f"{len(jobs)} answers computed alone", flush=True)
    if options.compare:
        for kind in [*kinds]:
            own = [job for job in jobs if job.kind == kind]
            for clients in map(int, options.compare.split(",")):
                await load(url, own, clients, None, clients, 0, None)  # what is captured or allocated once
                found = await load(url, own, clients, None, max(options.requests, 2 * clients), 0, process)
                results[f"{kind}, {clients} clients"] = asdict(found)
                print(kind, clients, "clients:", found.per_second, "first", found.first, "whole", found.whole, "wrong",
                      found.wrong, flush=True)  # fmt: skip
        return results
    found = await load(url, jobs, options.clients, options.seconds, None, options.leave, process)
    print(json.dumps({k: v for k, v in asdict(found).items() if k != "memory_mib"}, indent=1), flush=True)
    return {"load": asdict(found)}


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--model", default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--rows", type=int, default=16, help="most requests that run at a time")
    parser.add_argument("--images-together", type=int, default=8)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--compare", help="numbers of clients, such as 1,16: throughput of each kind by itself")
    parser.add_argument("--requests", type=int, default=32, help="of a comparison")
    parser.add_argument("--kinds", default="text,image,mixed", help="kinds of requests, in turn")
    parser.add_argument("--jobs", type=int, default=12, help="different requests")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--tokens", type=int, default=40, help="most tokens of a text")
    parser.add_argument("--leave", type=float, default=0.05, help="share of requests whose client leaves")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with server(options) as (url, process):
        results = asyncio.run(run(options, url, process))
    if options.output:
        from mm_interleaved.bench.machine import describe

        settings = {k: v for k, v in vars(options).items() if k != "output"}
        options.output.write_text(json.dumps({**describe(), "settings": settings, "results": results}, indent=1) + "\n")
    wrong = sum(found["wrong"] for found in results.values())
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    main()
