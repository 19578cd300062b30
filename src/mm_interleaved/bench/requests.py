"""Lines about requests of a server and of an evaluation, through the public generation calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..document import Document, Image, Text
from ..generation import TEXT_PRESETS, GenerationSettings, InterleavedGenerator, TextDelta, TextSettings
from ..model import roofline
from ..processor.images import to_pil
from .base import Bench, Row
from .session import Session


def first_token(bench: Bench) -> Iterator[Row]:
    """The time from the request of a new session to its first text, in a process that has run sessions before."""
    length, count = bench.sizes.texts[0]
    config = bench.model.config
    images = [Image(to_pil(pixels.cpu().numpy())) for pixels in bench.noise[:count]]
    words = max(1, length - 1 - count * (1 + config.num_image_tokens))
    prompt = Text("a" + " a" * (words - 1))
    document = Document([*images, prompt, Text()])
    tokens = bench.sizes.round_tokens
    text = TextSettings(num_beams=1, max_new_tokens=tokens, min_new_tokens=tokens)
    given = int(bench.loaded.processor([Document([*images, prompt])]).attention_mask.sum())

    def first() -> None:
        events = bench.model.generate_interleaved(document, bench.loaded.processor, GenerationSettings(text))
        next(event for event in events if isinstance(event, TextDelta))

    need = roofline.prefill(bench.model, bench.cost, given, count)
    value, peak = bench.clock.time(first, bench.sizes.repeats), bench.clock.peak(first)
    yield Row("first-token", f"{given} tokens, {count} images", "ms", 1e3 * value, bound=1e3 * bench.bound(need),
              peak_bytes=peak)  # fmt: skip


def two_sessions(bench: Bench) -> Iterator[Row]:
    """Two sessions that take turns round by round, each with its own state; the reference runs one after the other."""
    rounds = max(1, bench.sizes.rounds // 2)

    def sessions() -> list[Session]:
        return [Session(InterleavedGenerator, bench, "static") for _ in range(2)]

    def together() -> None:
        pair = sessions()
        for _ in range(rounds):
            for one in pair:
                one.round()

    def alone() -> None:
        for one in sessions():
            for _ in range(rounds):
                one.round()

    value, reference = bench.clock.time(together, 1), bench.clock.time(alone, 1, warm_up=0)
    peaks = [bench.clock.peak(work) for work in (together, alone)]
    case = f"2 sessions, each {rounds} rounds of {bench.sizes.round_tokens} tokens and an image"
    yield Row("two-sessions", case, "s", value, reference, peak_bytes=peaks[0], reference_peak_bytes=peaks[1])


def evaluation(bench: Bench) -> Iterator[Row]:
    """Captions of a batch of images, by beam search as the captioning tasks ask for them."""
    size = bench.sizes.captions
    noise = [bench.noise[i % len(bench.noise)].roll(i, -1).cpu().numpy() for i in range(size)]
    batch = bench.loaded.processor(
        [Document([Image(to_pil(x)), Text("a photo of")]) for x in noise], padding_side="left"
    )
    usual = TEXT_PRESETS["caption"]
    settings = replace(usual, min_new_tokens=usual.max_new_tokens)

    def captions() -> None:
        bench.model.generate_text(batch, settings)

    value, peak = bench.clock.time(captions, 2), bench.clock.peak(captions)
    case = f"batch of {size}, {settings.num_beams} beams, {settings.max_new_tokens} tokens"
    yield Row("evaluation", case, "ms/caption", 1e3 * value / size, peak_bytes=peak)
