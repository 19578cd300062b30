"""A deterministic engine without a model: what it generates follows from the request alone.

A text has some words made from a digest of the request, an image one colour made from it. An answer alternates texts
and images as a model would that likes both. Every event takes `delay` seconds.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import PIL.Image

from ..document import Document, Image, Segment, Text
from ..generation.settings import GenerationSettings
from ..inspection import Inspection, Points, TextRecord
from ..inspection.page import to_json
from ..io import InputError
from ..io.images import load_image
from .engine import (
    DeadlineExceeded,
    Done,
    Engine,
    EngineError,
    Event,
    GenerationRequest,
    ImageDone,
    ImageProgress,
    Limits,
    Load,
    Overloaded,
    Reason,
    ScoredText,
    Started,
    Stream,
    TextDelta,
    TextDone,
    Unavailable,
    Usage,
)

WORDS = ("red", "house", "stands", "by", "the", "blue", "lake", "and", "a", "dog", "sleeps", "there")
TURNS = 4  # most texts and images of an answer without slots
IMAGE_TOKENS = 4
FAILS = "please fail"  # a document that ends with it fails


class _StubStream(Stream):
    def __init__(self) -> None:
        super().__init__()
        self.task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        if self.task is not None and not self.task.done():
            self.task.cancel()


class StubEngine(Engine):
    """The stub.

    Args:
        model: its name.
        adapters: names of adapters, which change what is generated.
        delay: seconds between two events.
        rows, queue: most running and waiting requests.
        words: words of a text.
    """

    def __init__(
        self,
        model: str = "stub",
        adapters: Sequence[str] = (),
        *,
        delay: float = 0.0,
        rows: int = 8,
        queue: int = 64,
        words: int = 6,
        image_size: int = 32,
    ) -> None:
        self.model, self.adapters, self.delay, self.words = model, tuple(adapters), delay, words
        self.limits = Limits(context=2048, images=16, image_size=image_size, steps=100)
        self.load, self._queue = Load(rows=rows), queue
        self._free = asyncio.Semaphore(rows)
        self._alive = False
        self.inspects = True
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def alive(self) -> bool:
        """Whether it was started and not stopped."""
        return self._alive

    async def start(self) -> None:
        """Make it ready."""
        self._alive = True

    async def stop(self, grace: float) -> None:
        """End all requests."""
        self._alive = False
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        for task in self._tasks:
            task.cancel()

    def check_room(self) -> None:
        """Check whether one more request can wait."""
        if not self._alive:
            raise Unavailable("the server is shutting down")
        if self.load.running + self.load.waiting >= self.load.rows + self._queue:
            raise Overloaded(f"{self.load.waiting} requests are waiting", 1)

    async def submit(self, request: GenerationRequest) -> Stream:
        """Start a request."""
        self.check_room()
        if _tokens(request.document) > self.limits.context:
            raise InputError(f"{_tokens(request.document)} tokens are more than the {self.limits.context} of the "
                             "model's context", request.document.name, "Shorten it")  # fmt: skip
        stream = _StubStream()
        self.load.waiting += 1
        task = stream.task = asyncio.create_task(self._run(request, stream))
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:  # also of a task that was cancelled before it began
            self._tasks.discard(task)
            self.load.waiting = len(self._tasks) - self.load.running
            if task.cancelled():
                self.load.cancelled += 1
                stream.put(EngineError("cancelled"))

        task.add_done_callback(ended)
        return stream

    async def _run(self, request: GenerationRequest, stream: Stream) -> None:
        try:
            async with asyncio.timeout(request.seconds), self._free:
                self.load.waiting, self.load.running = self.load.waiting - 1, self.load.running + 1
                try:
                    for event in _events(request, self.words, self.limits.image_size):
                        await asyncio.sleep(self.delay)
                        self.load.images += isinstance(event, ImageDone)
                        stream.put(event)
                finally:
                    self.load.running -= 1
        except TimeoutError:
            stream.put(DeadlineExceeded(f"not finished within {request.seconds:g} s"))
        except EngineError as error:
            self.load.failed += 1
            stream.put(error)

    async def score(
        self, document: Document, texts: Sequence[str], adapter: str | None = None, seconds: float | None = None
    ) -> list[ScoredText]:
        """Every token is a word with the space before it; its log-probability follows from its length."""
        self.check_room()
        found = []
        self.load.running += 1
        try:
            async with asyncio.timeout(seconds):
                for text in texts:
                    words = re.findall(r"\s*\S+\s*$|\s*\S+|\s+", text)
                    await asyncio.sleep(self.delay)
                    found.append(ScoredText(words, [-0.1 * len(word) for word in words]))
        except TimeoutError:
            raise DeadlineExceeded(f"not finished within {seconds:g} s") from None
        finally:
            self.load.running -= 1
        return found


def _tokens(document: Document) -> int:
    return sum(len((s.text or "").split()) if isinstance(s, Text) else IMAGE_TOKENS for s in document.segments)


def _digest(document: Document, settings: GenerationSettings, adapter: str | None) -> bytes:
    shown = [s.text if isinstance(s, Text) else _pixels(s) for s in document.segments]
    about = json.dumps([shown, asdict(settings), adapter], default=str)
    return hashlib.sha256(about.encode()).digest()


def _pixels(image: Image) -> str | None:
    if image.source is None:
        return None
    assert isinstance(image.source, PIL.Image.Image)
    return hashlib.sha256(load_image(image.source).tobytes()).hexdigest()


def _events(request: GenerationRequest, words: int, side: int) -> Iterator[Event]:
    """All events of a request, in order."""
    yield Started()
    document, settings = request.document, request.settings
    given = [s for s in document.segments if not s.is_open]
    if given and isinstance(given[-1], Text) and (given[-1].text or "").endswith(FAILS):
        raise EngineError("the model failed")
    slots = ["text" if isinstance(s, Text) else "image" for s in document.segments if s.is_open]
    turns = slots or ["text", "image"] * (TURNS // 2)
    digest, left, images = _digest(document, settings, request.adapter), settings.max_tokens or 10**9, 0
    reason: Reason = "end"
    used, segments = 0, list(given)
    for number, turn in enumerate(turns):
        if turn == "image" and settings.max_images is not None and images >= settings.max_images:
            reason = "images"
            break
        if turn == "text" and used >= left:
            reason = "length"
            break
        if turn == "text":
            most = min(words, settings.text.max_new_tokens, left - used)
            said = [WORDS[digest[(number * 7 + i) % 32] % len(WORDS)] for i in range(most)]
            for i, word in enumerate(said):
                yield TextDelta(word if i == 0 else f" {word}")
            used += most
            segments.append(Text(" ".join(said)))
            yield TextDone(" ".join(said), most < words)
            reason = "length" if most < words else "end"
            continue
        made = []
        for candidate in range(settings.image.num_candidates):
            colour = tuple(digest[(number + candidate + i) % 32] for i in range(3))
            image = PIL.Image.new("RGB", (side, side), colour)
            total, every = settings.image.num_inference_steps, settings.image.preview_every
            for step in range(1, total + 1):
                due = every and step % every == 0 and step < total
                yield ImageProgress(step, total, image if due else None, candidate)
            made.append(image)
        images += 1
        segments.append(Image(made[0]))
        yield ImageDone(made)
    usage = Usage(_tokens(document), 0, used + images * IMAGE_TOKENS,
                  sum(isinstance(s, Image) and not s.is_open for s in document.segments), images)  # fmt: skip
    yield Done(reason, usage, None if request.inspect is None else _inspection(segments, len(given)))


def _inspection(segments: list[Segment], given: int) -> str:
    """An inspection in which every word looks at the upper left and the lower right of every earlier image."""
    records: list[TextRecord] = []
    views: list[PIL.Image.Image] = []
    for place, segment in enumerate(segments):
        if isinstance(segment, Image):
            assert isinstance(segment.source, PIL.Image.Image)
            views.append(segment.source.convert("RGB").resize((64, 64)))
        elif place >= given:
            words, seen = (segment.text or "").split(), len(views)
            pieces = [word if i == 0 else f" {word}" for i, word in enumerate(words)]
            where = np.broadcast_to(np.array([[0.25, 0.25], [0.75, 0.75]], np.float32), (len(words), 1, 1, seen, 2, 2))
            weights = np.full((len(words), 1, 1, seen, 1, 2), 0.4 / max(seen, 1), np.float32)
            points = Points(where, weights, 1 - weights.sum((-1, -2, -3)))
            records.append(TextRecord(place, [0] * len(words), pieces, [(i, i + 1) for i in range(len(words))],
                                      list(range(seen))[::-1], [0], [0], [8], 8, points))  # fmt: skip
    return to_json(Inspection(Document(segments), "slots", records, [], views))
