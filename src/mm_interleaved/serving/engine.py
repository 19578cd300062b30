"""The interface between the protocols and what generates: requests, events, streams.

An engine takes documents and yields events in their order. Two implement it: a model (`model.py`), and a deterministic
stub (`stub.py`) on which the protocols are tested.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal

import PIL.Image

from ..document import Document
from ..generation.settings import GenerationSettings
from ..inspection import InspectionSettings
from ..io import UserError

Reason = Literal["end", "length", "images"]


class Overloaded(UserError):
    """The queue is full.

    Attributes:
        retry_after: seconds after which to try again.
    """

    def __init__(self, problem: str, retry_after: int) -> None:
        super().__init__(problem, fix=f"Try again in {retry_after} s")
        self.retry_after = retry_after


class EngineError(RuntimeError):
    """Generation failed; the message is fit for clients."""


class Unavailable(EngineError):
    """The engine takes no requests: it is shutting down, or it stopped because of an error."""


class DeadlineExceeded(EngineError):
    """A request was not finished in its time."""


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate.

    Attributes:
        document: the input, with open slots at its end; without any, the model continues it by itself.
        settings: all settings, with seeds.
        adapter: name of the adapter; None: the model itself.
        seconds: time in which it must be finished, waiting included; None: no limit.
        inspect: what to collect of where MMFS looks; None: nothing.
    """

    document: Document
    settings: GenerationSettings
    adapter: str | None = None
    seconds: float | None = None
    inspect: InspectionSettings | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; an image counts as its image tokens.

    Attributes:
        input_tokens: of the document.
        cached_tokens: of these, those that needed no processing.
        output_tokens: generated ones.
        input_images, output_images: number of images.
    """

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    input_images: int = 0
    output_images: int = 0


@dataclass(frozen=True)
class Started:
    """The request left the queue."""


@dataclass(frozen=True)
class TextDelta:
    """More text of the current text."""

    text: str


@dataclass(frozen=True)
class TextDone:
    """The current text is complete.

    Attributes:
        text: all of it.
        truncated: whether it ended by a limit and not by itself.
    """

    text: str
    truncated: bool = False


@dataclass(frozen=True)
class ImageProgress:
    """A denoising step of the current image.

    Attributes:
        step, total: number of the step from 1, and number of steps.
        preview: what the image looks like so far, if previews were asked for.
        candidate: number of the candidate.
    """

    step: int
    total: int
    preview: PIL.Image.Image | None = None
    candidate: int = 0


@dataclass(frozen=True)
class ImageDone:
    """The current image is complete; all its candidates, the first of which the document continues from."""

    images: Sequence[PIL.Image.Image]


@dataclass(frozen=True)
class Done:
    """The end of a request.

    Attributes:
        reason: the model ended (`end`), a limit of tokens or the context was reached (`length`), or the most images
            were generated (`images`).
        usage: what it took.
        inspection: what the request asked to collect, as the data of its page (JSON text); None: nothing.
    """

    reason: Reason
    usage: Usage
    inspection: str | None = None


Event = Started | TextDelta | TextDone | ImageProgress | ImageDone | Done


@dataclass(frozen=True)
class Limits:
    """What a model can take.

    Attributes:
        context: most tokens of a document with all that is generated.
        images: most images of a document.
        image_size: side of a generated image in pixels.
        steps: most denoising steps.
    """

    context: int
    images: int
    image_size: int
    steps: int


@dataclass
class Load:
    """What an engine is doing.

    Attributes:
        running, waiting: numbers of requests.
        rows: most running ones.
        tokens, images: generated since the start.
        cancelled, failed: numbers of requests since the start.
    """

    running: int = 0
    waiting: int = 0
    rows: int = 0
    tokens: int = 0
    images: int = 0
    cancelled: int = 0
    failed: int = 0


class Stream:
    """The events of one request. Leaving the loop early does not stop the request: call `cancel`."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self.ended = False

    def put(self, event: Event | Exception) -> None:
        """Add an event; for engines, on the event loop."""
        self._events.put_nowait(event)

    def cancel(self) -> None:
        """Stop the request; nothing happens if it has ended."""
        raise NotImplementedError

    async def next(self, seconds: float | None = None) -> Event | None:
        """The next event; None: there was none for so many seconds.

        Raises:
            EngineError: generation failed.
        """
        try:
            event = await asyncio.wait_for(self._events.get(), seconds)
        except TimeoutError:
            return None
        if isinstance(event, Exception):
            self.ended = True
            raise event
        self.ended = isinstance(event, Done)
        return event

    async def __aiter__(self) -> AsyncIterator[Event]:
        while not self.ended:
            event = await self.next()
            assert event is not None  # without a limit of time there is one
            yield event


@dataclass(frozen=True)
class ScoredText:
    """Log-probabilities of a text's tokens after a document.

    Attributes:
        tokens: the text of each token; joined they are the text. A token that ends inside a character has none.
        log_probabilities: of each.
    """

    tokens: list[str]
    log_probabilities: list[float]


class Engine(ABC):
    """What generates."""

    model: str
    """The name under which the model is served."""
    adapters: Sequence[str] = ()
    """The names of its adapters."""
    inspects: bool = False
    """Whether requests may ask to inspect them."""
    limits: Limits
    load: Load

    @abstractmethod
    async def start(self) -> None:
        """Make it ready for requests."""

    @abstractmethod
    async def stop(self, grace: float) -> None:
        """Take no more requests, let those that run finish for `grace` seconds, and end the others."""

    @abstractmethod
    def check_room(self) -> None:
        """Check whether one more request can wait, before work is done for it.

        Raises:
            Overloaded, Unavailable: as `submit`.
        """

    @abstractmethod
    async def submit(self, request: GenerationRequest) -> Stream:
        """Start a request.

        Raises:
            InputError: the document cannot be used, or does not fit into the context.
            Overloaded: too many requests wait.
            Unavailable: it is shutting down, or has stopped.
        """

    @abstractmethod
    async def score(
        self, document: Document, texts: Sequence[str], adapter: str | None = None, seconds: float | None = None
    ) -> list[ScoredText]:
        """Log-probabilities of each of `texts` after a document. Who cancels the call frees the engine.

        Args:
            document: comes before each text; without open slots.
            texts: none of them is empty.
            adapter, seconds: as in `GenerationRequest`.

        Raises:
            InputError, Overloaded, Unavailable: as `submit`.
            DeadlineExceeded: it was not finished within `seconds`.
        """

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether it can answer requests."""
