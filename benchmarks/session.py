"""What the caches of the interleaved generator save: a session of 1 to 20 rounds with and without them.

python benchmarks/session.py --model small --rounds 20 --output benchmarks/results/session.json

A round is a text of a fixed number of tokens and a picture. Both ways write the same document in one process, taking
rounds in turn. Reading is what goes through the visual tokenizer, and through the language model many tokens at a time;
writing token by token and drawing cost the same both ways and are part of the total only.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from machine import describe
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mm_interleaved import Document, GenerationSettings, Image, ImageSettings, SegmentFinished, Text, TextSettings
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.generation.recompute import RecomputingGenerator
from mm_interleaved.pretrained import Loaded, load


@dataclass
class Count:
    """Totals since the beginning of a session."""

    prefilled: int = 0  # tokens that were read many at a time
    encoded: int = 0  # pictures
    reading: float = 0.0  # seconds
    total: float = 0.0  # seconds


class Meter:
    """Counts what goes through a model's modules, with PyTorch's own hooks."""

    def __init__(self, loaded: Loaded) -> None:
        self.count, self.device = Count(), loaded.model.compute_device
        for module in (loaded.model.visual_tokenizer, loaded.model.language_model):
            module.register_forward_pre_hook(self._start)
        loaded.model.visual_tokenizer.register_forward_hook(self._encoded)
        loaded.model.language_model.register_forward_hook(self._read, with_kwargs=True)

    def now(self) -> float:
        """Seconds, after everything before has happened."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _start(self, *_: object) -> None:
        self.started = self.now()

    def _encoded(self, module: torch.nn.Module, args: tuple, output: object) -> None:
        self.count.encoded += len(args[0])
        self.count.reading += self.now() - self.started

    def _read(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        batch, length, _ = kwargs["inputs_embeds"].shape
        if length > 1:
            self.count.prefilled += batch * length
            self.count.reading += self.now() - self.started


class Session:
    """One way to write the document, a round at a time."""

    def __init__(self, kind: type[InterleavedGenerator], loaded: Loaded, settings: GenerationSettings) -> None:
        picture = PIL.Image.open(Path(__file__).parents[1] / "examples" / "pictures" / "house.png")
        document = Document([Text("A house on a hill."), Image(picture), Text("What happens there?")])
        self.events = kind(loaded.model, loaded.processor, settings, progress=False).run([document])
        self.count, self.rounds = Count(), []
        self.texts: list[list[int]] = []
        self.pictures: list[PIL.Image.Image] = []

    def round(self, meter: Meter) -> None:
        """Go on until the next picture is finished."""
        meter.count, begin = self.count, meter.now()
        for event in self.events:
            if isinstance(event, SegmentFinished) and isinstance(event.segment, Text):
                self.texts.append(event.ids)
            elif isinstance(event, SegmentFinished):
                self.pictures.append(event.segment.source)
                break
        self.count.total += meter.now() - begin
        self.rounds.append(replace(self.count))


def table(cached: list[Count], plain: list[Count]) -> Table:
    """A row for each number of rounds."""
    out = Table(title="with caches : without")
    for name in ("rounds", "tokens read", "pictures read", "s reading", "ratio", "s in all", "ratio"):
        out.add_column(name, justify="right", no_wrap=True)
    for number, (a, b) in enumerate(zip(cached, plain, strict=True), 1):
        out.add_row(
            str(number),
            f"{a.prefilled} : {b.prefilled}",
            f"{a.encoded} : {b.encoded}",
            f"{a.reading:.2f} : {b.reading:.2f}",
            f"{b.reading / a.reading:.1f}",
            f"{a.total:.1f} : {b.total:.1f}",
            f"{b.total / a.total:.2f}",
        )
    return out


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="small, debug or a checkpoint's folder")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16, help="of each text")
    parser.add_argument("--steps", type=int, default=30, help="of each picture")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    loaded = load(options.model, getattr(torch, options.dtype), options.device)
    text = TextSettings(num_beams=1, max_new_tokens=options.tokens, min_new_tokens=options.tokens)
    images = ImageSettings(num_inference_steps=options.steps)
    settings = GenerationSettings(text, images, max_turns=2 * options.rounds, force_image=True, stop_at_eos=False)
    meter = Meter(loaded)
    kinds = (InterleavedGenerator, RecomputingGenerator)
    for kind in kinds:
        Session(kind, loaded, settings).round(meter)  # to warm up
    cached, plain = sessions = [Session(kind, loaded, settings) for kind in kinds]
    for _ in track(range(options.rounds), "rounds", console=Console(stderr=True), transient=True):
        for one in sessions:
            one.round(meter)
    same = sum(a == b for a, b in zip(cached.texts, plain.texts, strict=True))
    apart = max(
        int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())
        for a, b in zip(cached.pictures, plain.pictures, strict=True)
    )
    console = Console()
    console.print(table(cached.rounds, plain.rounds))
    console.print(f"{same} of {len(cached.texts)} texts are equal; pictures differ by at most {apart} of 255")
    if options.output is not None:
        rows = [{"rounds": n, "cached": asdict(a), "recomputed": asdict(b)}
                for n, (a, b) in enumerate(zip(cached.rounds, plain.rounds, strict=True), 1)]  # fmt: skip
        result = {
            **describe(),
            "equal_texts": same,
            "texts": len(cached.texts),
            "picture_difference": apart,
            "rows": rows,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
