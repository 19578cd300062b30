"""What the release's size costs: tokens, pictures, sessions; the fast form against the published one, both in one run.

python benchmarks/release.py --output benchmarks/results/release.json          # one GPU with 80 GB
python benchmarks/release.py --preset debug --device cpu --dtype float32      # to see that it runs

Weights are random: what is written means nothing and costs the same. The vocabulary is that of the package's tokenizer.

    fast        what `generate_interleaved` does: values projected once, the query side folded, caches kept across turns
    published   the formula as it stands in the paper, values kept
    original    the same with the values of all visible pictures projected for every token, as the release does
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from machine import describe
from rich.console import Console
from session import Meter, Session

from mm_interleaved import GenerationSettings, ImageSettings, MMInterleaved, MMInterleavedConfig, TextSettings
from mm_interleaved.generation import Context, InterleavedGenerator
from mm_interleaved.generation.recompute import RecomputingGenerator
from mm_interleaved.model.language_model import synchronizers
from mm_interleaved.pretrained import FOLDER, Loaded
from mm_interleaved.processor import MMInterleavedProcessor, MMInterleavedTokenizer

say = Console(stderr=True).print


def fresh(preset: str, device: torch.device, dtype: torch.dtype) -> Loaded:
    """A model of that size with random weights and none at zero, made on the device."""
    config, small = MMInterleavedConfig.preset(preset), MMInterleavedConfig.preset("small")
    config.text_config.vocab_size = small.text_config.vocab_size
    for name in ("bos", "eos", "pad", "soi", "image"):
        setattr(config, f"{name}_token_id", getattr(small, f"{name}_token_id"))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = MMInterleaved(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    model.image_decoder.vae.float()
    words = MMInterleavedTokenizer.from_vocab(FOLDER / "tokenizer")
    return Loaded(model, MMInterleavedProcessor.for_model(config, words), trained=False, name=preset)


class Clock:
    """Seconds on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
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


def limits(clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """What the machine can do: bytes read a second (from a copy, which reads and writes), operations a second."""
    size = 2**32 if clock.device.type == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=clock.device).random_()
    target = torch.empty_like(source)
    copy = clock.time(lambda: target.copy_(source))
    side = 8192 if clock.device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=clock.device, dtype=dtype) for _ in range(2))
    product = clock.time(lambda: a @ b)
    return {"bytes_per_second": 2 * size / copy, "operations_per_second": 2 * side**3 / product}


def read(loaded: Loaded, pictures: int) -> tuple[Context, torch.Tensor]:
    """A context of that many pictures, and their pixels."""
    config = loaded.model.config
    ids = [config.bos_token_id]
    for _ in range(pictures):
        ids += [20] * 8 + [config.soi_token_id] + [config.image_token_id] * config.num_image_tokens
    ids += [20] * 8
    side, device = config.vision_config.image_size, loaded.model.compute_device
    pixels = torch.rand(pictures, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    context = Context.empty(loaded.model, 1)
    tokens = torch.tensor([ids], device=device)
    context.append(tokens, torch.ones_like(tokens), pixels)
    return context, pixels


def decoding(loaded: Loaded, clock: Clock, counts: list[int], tokens: int) -> list[dict[str, float]]:
    """Milliseconds a token, by number of visible pictures."""
    rows = []
    model = loaded.model
    one = torch.tensor([[20]], device=model.compute_device)
    for count in counts:
        row: dict[str, float] = {"pictures": count}
        for way in ("fast", "published", "original"):
            model.set_mmfs_implementation("fast" if way == "fast" else "reference")
            context, _ = read(loaded, count)

            def work(context: Context = context, way: str = way) -> None:
                for _ in range(tokens):
                    if way == "original" and context.memory is not None:
                        for layer in synchronizers(model.language_model):
                            layer.mmfs.project(context.memory.features)
                    context.append_text(one, torch.ones_like(one))
                    model.lm_head(context.last)

            row[way] = 1000 * clock.time(work, repeats=2) / tokens
        say("a token, ms:", {k: round(v, 2) for k, v in row.items()})
        rows.append(row)
    model.set_mmfs_implementation("fast")
    return rows


def drawing(loaded: Loaded, clock: Clock, counts: list[int], steps: int) -> list[dict[str, float]]:
    """Seconds a picture of `steps` guided steps, by number of earlier pictures that it is drawn from."""
    rows = []
    model, settings = loaded.model, ImageSettings(num_inference_steps=steps)
    for count in counts:
        row: dict[str, float] = {"earlier": count}
        context, _ = read(loaded, count)
        for way in ("fast", "published"):
            model.set_mmfs_implementation("fast" if way == "fast" else "reference")

            def work(context: Context = context) -> None:
                with torch.no_grad():
                    conditions = model.image_decoder.resampler(*context.image_context([0]))
                generator = [torch.Generator().manual_seed(0)]
                *_, last = model.image_decoder.denoise(conditions, context.earlier_images([0]), settings, generator)
                model.image_decoder.decode(last.latents)

            row[way] = clock.time(work, repeats=1)
        say("a picture, s:", {k: round(v, 3) for k, v in row.items()})
        rows.append(row)
    model.set_mmfs_implementation("fast")
    return rows


def sessions(loaded: Loaded, rounds: int, tokens: int, steps: int) -> Iterator[dict[str, object]]:
    """Sessions of that many rounds, three ways, round by round in turn."""
    text = TextSettings(num_beams=1, max_new_tokens=tokens, min_new_tokens=tokens)
    settings = GenerationSettings(text, ImageSettings(num_inference_steps=steps), max_turns=2 * rounds,
                                  force_image=True, stop_at_eos=False)  # fmt: skip
    ways = {
        "fast": InterleavedGenerator,
        "recomputing": RecomputingGenerator,
        "recomputing, published": RecomputingGenerator,
    }
    meter = Meter(loaded)
    for kind in ways.values():  # kernels are loaded when they are first used
        Session(kind, loaded, settings).round(meter)
    running = {way: Session(kind, loaded, settings) for way, kind in ways.items()}
    for number in range(1, rounds + 1):
        row: dict[str, object] = {"rounds": number}
        for way, session in running.items():
            loaded.model.set_mmfs_implementation("reference" if "published" in way else "fast")
            session.round(meter)
            row[way] = vars(session.rounds[-1])
        say(number, "rounds, s reading and in all:",
            {way: (round(s.count.reading, 2), round(s.count.total, 1)) for way, s in running.items()})  # fmt: skip
        yield row
    loaded.model.set_mmfs_implementation("fast")


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="release")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=16, help="decoded for each figure")
    parser.add_argument("--steps", type=int, default=30, help="of each picture")
    parser.add_argument("--rounds", type=int, default=20, help="of the session")
    parser.add_argument("--session-steps", type=int, default=5, help="of each picture in the session")
    parser.add_argument("--pictures", type=int, nargs="+", default=[0, 1, 5, 20], help="visible while decoding")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    clock = Clock(device)
    result = {**describe(), "limits": limits(clock, dtype)}
    say("limits:", result["limits"])
    begin = clock()
    loaded = fresh(options.preset, device, dtype)
    say(f"model made in {clock() - begin:.0f} s")
    text = [*loaded.model.language_model.parameters(), *loaded.model.lm_head.parameters()]
    weights = sum(p.numel() * p.element_size() for p in text)
    result["token_limit_ms"] = 1000 * weights / result["limits"]["bytes_per_second"]
    say(f"reading the language model's {weights / 1e9:.1f} GB once takes {result['token_limit_ms']:.2f} ms")
    side = loaded.model.config.vision_config.image_size
    pixels = torch.rand(1, 3, side, side, device=device)
    result["encode_ms"] = 1000 * clock.time(lambda: loaded.model.remember(loaded.model.encode_images(pixels).pyramid))
    say(f"seeing a picture: {result['encode_ms']:.1f} ms")

    def keep() -> None:
        if device.type == "cuda":
            result["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
        if options.output is not None:
            options.output.write_text(json.dumps(result, indent=1) + "\n")

    with torch.no_grad():
        result["token_ms"] = decoding(loaded, clock, options.pictures, options.tokens)
        keep()
        most = loaded.model.config.image_decoder.previous_images
        result["picture_s"] = drawing(loaded, clock, sorted({0, 1, most}), options.steps)
        keep()
        result["session"] = []
        for row in sessions(loaded, options.rounds, options.tokens, options.session_steps):
            result["session"].append(row)
            keep()


if __name__ == "__main__":
    main()
