"""Lines about sessions: rounds of text and an image, with caches or with recomputation at every turn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import PIL.Image

from ..document import Document, Image, Text
from ..generation import GenerationSettings, ImageSettings, InterleavedGenerator, SegmentFinished, TextSettings
from ..generation.recompute import RecomputingGenerator
from ..generation.settings import CacheImplementation
from ..model import roofline
from .base import Bench, Row


class Session:
    """Generates a document that starts with an image, one round at a time."""

    def __init__(self, kind: type[InterleavedGenerator], bench: Bench, implementation: CacheImplementation) -> None:
        sizes, noise = bench.sizes, np.random.default_rng(0)
        given = PIL.Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        text = TextSettings(num_beams=1, max_new_tokens=sizes.round_tokens, min_new_tokens=sizes.round_tokens,
                            cache_implementation=implementation)  # fmt: skip
        image = ImageSettings(num_inference_steps=sizes.steps, cache_implementation=implementation,
                              compile=bench.compile and implementation == "static")  # fmt: skip
        settings = GenerationSettings(text, image, max_turns=2 * sizes.rounds, force_image=True, stop_at_eos=False)
        document = Document([Text("A house on a hill."), Image(given), Text("What happens there?")])
        self.generator = kind(bench.model, bench.loaded.processor, settings, progress=False)
        self.events = self.generator.run([document])
        self.clock, self.seconds = bench.clock, 0.0
        self.made: list[object] = []

    def round(self) -> bool:
        """Continue until the next image is finished; returns whether the context had room for one."""
        begin, drawn = self.clock(), False
        for event in self.events:
            if isinstance(event, SegmentFinished):
                segment = event.segment
                drawn = isinstance(segment, Image)
                if isinstance(segment, Image):
                    self.made.append(segment.source)
                    break
                assert segment.generated is not None
                self.made.append(list(segment.generated.ids))
        self.seconds += self.clock() - begin
        return drawn


def session(bench: Bench) -> Iterator[Row]:
    """A row for every round; the reference recomputes everything at every turn, without CUDA graphs.

    It ends when the model's context is full: at the release's size after 15 rounds of 60 tokens. The session runs once
    before it is measured, because a server captures (and compiles) its steps once.
    """
    sizes, model = bench.sizes, bench.model
    once = Session(InterleavedGenerator, bench, "static")
    for _ in range(sizes.rounds):
        once.round()
    del once  # frees its workspace for the next session
    fast = Session(InterleavedGenerator, bench, "static")
    plain = Session(RecomputingGenerator, bench, "dynamic")
    bound, room = 0.0, 0
    for number in range(1, sizes.rounds + 1):
        if not fast.round():
            limit = fast.generator.limit
            bench.say(f"session: {limit} tokens, all that the model reads, are full after {number - 1} rounds")
            return
        reference = number <= sizes.reference_rounds
        if reference:
            plain.round()
        room += sizes.round_tokens + 1 + model.config.num_image_tokens
        bound += sizes.round_tokens * bench.bound(roofline.decoding(model, bench.cost, room, number))
        bound += bench.bound(roofline.prefill(model, bench.cost, 1 + model.config.num_image_tokens, 1))
        bound += bench.bound(roofline.image(model, bench.cost))
        same = fast.made[: len(plain.made)] == plain.made or _close(fast.made, plain.made)
        note = "" if not reference else "same document" if same else "another document"
        case = f"{number} rounds of {sizes.round_tokens} tokens and an image of {sizes.steps} steps"
        yield Row("session", case, "s", fast.seconds, plain.seconds if reference else None, bound, note=note, x=number)


def _close(a: list[object], b: list[object]) -> bool:
    """Equal ids, and images within one rounding."""
    for x, y in zip(a, b, strict=False):
        if isinstance(x, list):
            if x != y:
                return False
        elif np.abs(np.asarray(x).astype(int) - np.asarray(y)).max() > 1:
            return False
    return True
