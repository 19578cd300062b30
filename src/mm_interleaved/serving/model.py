"""The engine of a model: continuous batching in one thread, which alone touches the model.

Requests wait in a queue until a row of the generation state is free. A turn of the thread lets requests join and leave,
gives every text a few tokens and every image a denoising step, and hands the events to the event loop. Texts get about
as much time as images, so that text goes on while images are denoised.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..document import Document, Image, Text
from ..generation import ContinuousGenerator, MMInterleaved
from ..generation import events as generation
from ..generation.incremental import IncrementalText
from ..generation.rows import PreparedDocument
from ..generation.rules import end_tokens
from ..generation.text import score_in_steps
from ..inspection import InspectedGenerator
from ..inspection.page import to_json
from ..io import InputError
from ..model.cost import row_bytes
from ..pretrained import Loaded
from ..processor import MMInterleavedProcessor
from ..processor.packing import TokenStream
from ..processor.tokenizer import encode_plain
from .config import ServeConfig
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

log = logging.getLogger(__name__)
MOST_TOKENS_A_TURN = 64  # decode steps beside one denoising step
SCORED_TOGETHER = 8  # texts of one step
SCORED_TOKENS = 128  # tokens of each of them
IDLE = 0.5  # seconds after which an idle thread looks whether it should end
REASONS: dict[str, Reason] = {
    "slots": "end", "eos": "end", "turns": "end", "segments": "end", "tokens": "length", "context": "length",
    "images": "images",
}  # fmt: skip


class _ModelStream(Stream):
    """A stream whose events come from the thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stop: Callable[[_Job], None]) -> None:
        super().__init__()
        self._loop, self._stop = loop, stop
        self.job: _Job | None = None

    def send(self, event: Event | Exception) -> None:
        """`put` from the thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.put, event)

    def cancel(self) -> None:
        if self.job is not None and not self.ended:
            self._stop(self.job)


@dataclass(eq=False)
class _Job:
    """A request in the engine.

    Attributes:
        request: the request.
        prepared: its document as tokens.
        stream: where its events go.
        until: monotonic time at which it must be finished.
        truncated: whether its last text ended by a limit.
        inspection: as in `Done`.
    """

    request: GenerationRequest
    prepared: PreparedDocument
    stream: _ModelStream
    until: float
    truncated: bool = False
    output_tokens: int = 0
    output_images: int = 0
    cached: int = 0
    inspection: str | None = None


@dataclass
class _Inspected:
    """The generator of an inspected request, and its events."""

    generator: InspectedGenerator
    events: Iterator[generation.Event]

    @classmethod
    def of(cls, model: MMInterleaved, processor: MMInterleavedProcessor, job: _Job) -> _Inspected:
        """The generator of a job, at its start."""
        generator = InspectedGenerator(model, processor, job.request.settings, job.request.inspect)
        return cls(generator, generator.run([job.prepared]))


@dataclass(eq=False)
class _Scoring:
    """Texts to score.

    Attributes:
        adapter: as in `GenerationRequest`.
        seconds, until: time in which it must be finished, and the monotonic time of its end.
        answer: hands over the scores of all tokens, or an error.
        prompt: the tokens before the texts.
        texts: the tokens of each.
        left: whether nobody waits for them any more.
        steps: the work; None: it has not begun.
    """

    adapter: str | None
    seconds: float | None
    until: float
    answer: Callable[[list[list[float]] | Exception], None]
    prompt: TokenStream = field(default_factory=TokenStream.empty)
    texts: list[list[int]] = field(default_factory=list)
    left: bool = False
    steps: Generator[None, None, list[Tensor]] | None = None


@dataclass
class _Command:
    """Work for the thread between two turns.

    Attributes:
        run: the work.
        refuse: what happens instead if the thread has ended.
    """

    run: Callable[[], None] = field(repr=False)
    refuse: Callable[[EngineError], None] = field(repr=False, default=lambda error: None)


class ModelEngine(Engine):
    """Serves a model. An inspected request has a generator of its own, which takes its steps between those of others.

    Args:
        model: the model; adapters that it has (PEFT) are chosen by name.
        processor: its processor.
        name: the name under which it is served.
        rows: most requests that run at a time.
        waiting: most requests that wait.
        memory: bytes for the rows; fewer rows if they do not fit. None: no limit.
        tokens: most tokens of a document; None: the model's context.
        images_together: most images of one call of the UNet.
        use_adapter: lets the model use an adapter by name (None: none).
        adapters: the names of the adapters.
    """

    def __init__(
        self,
        model: MMInterleaved,
        processor: MMInterleavedProcessor,
        name: str,
        *,
        rows: int = 8,
        waiting: int = 64,
        memory: float | None = None,
        tokens: int | None = None,
        images_together: int = 8,
        adapters: Mapping[str, Callable[[], None]] | None = None,
        without_adapter: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.adapters, self.inspects = name, tuple(adapters or {}), True
        self._model, self._processor = model, processor
        self._most_waiting = waiting
        self._switches = {None: without_adapter, **(adapters or {})}
        self._adapter: str | None = None
        config, decoder = model.config, model.image_decoder
        context = min(tokens or model.context_length, model.context_length)
        self.limits = Limits(context, config.mmfs.max_images - 1, decoder.config.image_size,
                             decoder.scheduler.config["num_train_timesteps"])  # fmt: skip
        self.row_bytes = row_bytes(model, context, self.limits.images)
        if memory is not None and memory < self.row_bytes:
            needed, given = (f"{size / 2**30:.2g} GiB" for size in (self.row_bytes, memory))
            raise InputError(
                f"a row of {context} tokens and {self.limits.images} images takes {needed}, and {given} are allowed",
                fix="Allow more memory, or fewer 'tokens'",
            )
        self._rows = rows if memory is None else min(rows, int(memory // self.row_bytes))
        self.load = Load(rows=self._rows)
        self._generator = ContinuousGenerator(model, processor, self._rows, tokens=tokens,
                                              images_together=images_together)  # fmt: skip
        self._waiting: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}
        self._inspected: dict[int, _Inspected] = {}
        self._scorings: deque[_Scoring] = deque()
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._accepts, self._ends, self._ended = False, False, False
        self._ending = threading.Lock()  # between the last command and the end of the thread
        self._failure: str | None = None
        self._helpers = ThreadPoolExecutor(2, "prepare")

    # ---- on the event loop

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive() and self._failure is None

    async def start(self) -> None:
        """Start the thread."""
        self._accepts = True
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def stop(self, grace: float) -> None:
        """Refuse new requests, finish those that there are for `grace` seconds, and end the thread."""
        self._accepts = False
        until = time.monotonic() + grace
        while self.alive and (self.load.waiting or self.load.running) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self._ends = True
        self._commands.put(_Command(lambda: None))
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 30)
        self._helpers.shutdown(wait=False, cancel_futures=True)

    async def submit(self, request: GenerationRequest) -> Stream:
        """Start a request."""
        self.check_room()
        if request.adapter not in self._switches:
            raise InputError(f"there is no adapter '{request.adapter}'")
        loop = asyncio.get_running_loop()
        stream = _ModelStream(loop, self._cancel)
        self.load.waiting += 1
        accepted = False
        try:
            prepared = await loop.run_in_executor(self._helpers, self._prepare, request)
            until = time.monotonic() + request.seconds if request.seconds is not None else float("inf")
            job = stream.job = _Job(request, prepared, stream, until)
            self._hand_over(_Command(lambda: self._waiting.append(job), lambda error: self._refuse(job, error)))
            accepted = True
        finally:
            self.load.waiting -= not accepted
        return stream

    async def score(
        self, document: Document, texts: Sequence[str], adapter: str | None = None, seconds: float | None = None
    ) -> list[ScoredText]:
        """Log-probabilities of each of `texts` after a document."""
        self.check_room()
        if adapter not in self._switches:
            raise InputError(f"there is no adapter '{adapter}'")
        until = time.monotonic() + seconds if seconds is not None else float("inf")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[list[float]]] = loop.create_future()
        self.load.waiting += 1
        job = _Scoring(adapter, seconds, until, partial(_settle, loop, future))
        try:
            found = await loop.run_in_executor(self._helpers, self._prepare_scores, job, document, texts)
            self._hand_over(_Command(partial(self._scorings.append, job), job.answer))
            scores = await future
        finally:
            self.load.waiting -= 1
            job.left = True
        return [ScoredText(tokens, values) for tokens, values in zip(found, scores, strict=True)]

    def _prepare_scores(self, job: _Scoring, document: Document, texts: Sequence[str]) -> list[list[str]]:
        """Set the tokens of a job; the texts of the tokens of each text."""
        prompt = self._generator.prepare(document).plan[0]
        assert not isinstance(prompt, str)  # the first part is given
        job.prompt, tokenizer, found = prompt, self._processor.tokenizer, []
        for text in texts:
            if job.left:
                raise EngineError("cancelled")
            if time.monotonic() > job.until:
                raise DeadlineExceeded(f"not finished within {job.seconds:g} s")
            decoder, ids = IncrementalText(tokenizer), encode_plain(tokenizer, text)
            if not ids:
                raise InputError("the text has no tokens")
            if len(ids) + len(prompt) > self.limits.context:
                raise InputError(f"{len(ids) + len(prompt)} tokens are more than the {self.limits.context} of the "
                                 "model's context", fix="Shorten it")  # fmt: skip
            job.texts.append(ids)
            found.append([decoder.add(token) for token in ids])
        return found

    def check_room(self) -> None:
        """Check whether one more request can wait."""
        if not self._accepts or not self.alive:
            raise self._end_error
        if self.load.running + self.load.waiting >= self._rows + self._most_waiting:
            raise Overloaded(f"{self.load.waiting} requests are waiting", min(1 + self.load.waiting // self._rows, 120))

    def _prepare(self, request: GenerationRequest) -> PreparedDocument:
        return self._generator.prepare(request.document)

    def _cancel(self, job: _Job) -> None:
        self._hand_over(_Command(lambda: self._drop(job, EngineError("cancelled"))))

    def _hand_over(self, command: _Command) -> None:
        """Give the thread a command; one that has ended refuses it."""
        with self._ending:
            if not self._ended:
                self._commands.put(command)
                return
        command.refuse(self._end_error)

    def _refuse(self, job: _Job, error: EngineError) -> None:
        self.load.waiting -= 1
        job.stream.send(error)

    @property
    def _end_error(self) -> Unavailable:
        return Unavailable(self._failure or "the server is shutting down")

    # ---- in the thread

    def _work(self) -> None:
        try:
            while not self._ends:
                failure: EngineError | None = (
                    None  # handled after the block, whose error holds the tensors of its frames
                )
                try:
                    self._take_commands()
                    self._turn()
                except torch.OutOfMemoryError:
                    log.exception("out of memory; all requests that run are ended")
                    failure = EngineError("the server ran out of memory")
                except Exception as error:  # whatever it is, every request gets an answer, and others are served
                    log.exception("a step failed; all requests that run are ended")
                    failure = EngineError(f"generation failed ({type(error).__name__})")
                if failure is not None:
                    self._restart(failure)
        except Exception:
            log.exception("the engine cannot go on after a failure; it has stopped")
        finally:
            self._refuse_all()

    def _refuse_all(self) -> None:
        """End all requests, since the thread ends."""
        if not self._ends:
            self._failure = "the engine stopped because of an error; the server's log has it"
        for job in [*self._running.values(), *self._waiting]:
            job.stream.send(self._end_error)
        for scoring in self._scorings:
            scoring.answer(self._end_error)
        self.load.running, self.load.waiting = 0, self.load.waiting - len(self._waiting)
        with self._ending:
            self._ended = True
        while not self._commands.empty():
            self._commands.get_nowait().refuse(self._end_error)

    def _take_commands(self) -> None:
        """Run the commands that wait; without any other work, wait for one."""
        idle = not self._running and not self._waiting and not self._scorings
        try:
            self._commands.get(timeout=IDLE if idle else 0).run() if idle else self._commands.get_nowait().run()
            while True:
                self._commands.get_nowait().run()
        except queue.Empty:
            pass

    def _turn(self) -> None:
        """Let requests join, and give every text and every image some steps, and one to the texts to score."""
        self._expire()
        self._admit()
        begun = time.monotonic()
        self._deliver(self._generator.step_images())
        spent = time.monotonic() - begun
        for job in [self._running[key] for key in self._inspected]:
            self._step_inspected(job)
        for _ in range(MOST_TOKENS_A_TURN):
            begun = time.monotonic()
            if not self._generator.writes:
                break
            self._deliver(self._generator.step_texts())
            spent -= time.monotonic() - begun
            if spent <= 0 or not self._commands.empty():
                break
        self._score()

    def _restart(self, error: EngineError) -> None:
        """End all requests that run, and start with empty memory.

        Raises:
            Exception: the model or its device does not work any more.
        """
        ended, scoring = list(self._running.values()), self._scorings.popleft() if self._scorings else None
        self._running.clear()
        self._inspected.clear()
        self.load.failed, self.load.running = self.load.failed + len(ended), 0
        for job in ended:
            job.stream.send(error)
        if scoring is not None:
            scoring.answer(error)
        self._generator.reset()
        self._generator.check()

    def _expire(self) -> None:
        """End the requests whose time is over, and forget scores that nobody waits for."""
        now = time.monotonic()
        for job in [j for j in [*self._running.values(), *self._waiting] if j.until < now]:
            self._drop(job, DeadlineExceeded(f"not finished within {job.request.seconds:g} s"))
        for scoring in [s for s in self._scorings if s.left or s.until < now]:
            self._scorings.remove(scoring)
            self.load.cancelled += 1
            if not scoring.left:
                scoring.answer(DeadlineExceeded(f"not finished within {scoring.seconds:g} s"))

    def _admit(self) -> None:
        """Let the requests at the front of the queue join while there are rows, and no other adapter is in use."""
        while self._waiting and len(self._running) < self._rows:
            job = self._waiting[0]
            if self._scorings and self._scorings[0].adapter != self._adapter:
                return  # texts to score wait for their adapter
            if job.request.adapter != self._adapter and (self._running or self._scorings):
                return
            if job.request.inspect is not None and self._inspected:
                return  # each has a state of its own beside the rows, so there is one at a time
            self._waiting.popleft()
            self._running[id(job)] = job  # an error ends it from here on
            self.load.waiting, self.load.running = self.load.waiting - 1, self.load.running + 1
            if job.request.adapter != self._adapter:
                self._use(job.request.adapter)
            before = self._generator.tokens_reused
            try:
                if job.request.inspect is None:
                    self._generator.join(id(job), job.prepared, job.request.settings)
                else:
                    self._inspected[id(job)] = _Inspected.of(self._model, self._processor, job)
            except (InputError, ValueError) as error:
                del self._running[id(job)]
                self.load.running -= 1
                job.stream.send(error if isinstance(error, InputError) else InputError(str(error)))
                continue
            job.cached = self._generator.tokens_reused - before
            job.stream.send(Started())

    def _use(self, adapter: str | None) -> None:
        """Use an adapter; what was processed without it is forgotten."""
        self._switches[adapter]()
        self._adapter = adapter
        self._generator.reset()

    def _drop(self, job: _Job, error: EngineError | InputError) -> None:
        """End a request before its time."""
        if job in self._waiting:
            self._waiting.remove(job)
            self.load.waiting -= 1
        elif self._running.pop(id(job), None) is not None:
            self.load.running -= 1
            self._inspected.pop(id(job), None)
        else:
            return
        self.load.cancelled += 1
        job.stream.send(error)
        self._generator.leave(id(job))

    def _step_inspected(self, job: _Job) -> None:
        """Hand on one event of an inspected request; one that collects too much is ended."""
        inspected = self._inspected[id(job)]
        try:
            event = next(inspected.events)
            if isinstance(event, generation.DocumentFinished):
                job.inspection = to_json(inspected.generator.inspection_of(0, event))
        except InputError as error:
            self._drop(job, error)
            return
        self._deliver(iter([(id(job), event)]))

    def _deliver(self, events: Iterator[tuple[Hashable, generation.Event]]) -> None:
        for key, event in events:
            assert isinstance(key, int)
            job = self._running.get(key)
            if job is None:
                continue
            translated = self._translate(job, event)
            if isinstance(event, generation.DocumentFinished):  # before its client knows
                del self._running[key]
                self._inspected.pop(key, None)
                self.load.running -= 1
            for one in translated:
                job.stream.send(one)

    def _translate(self, job: _Job, event: generation.Event) -> list[Event]:
        """An event of generation as events for clients."""
        if isinstance(event, generation.TextDelta):
            return [TextDelta(event.text)]
        if isinstance(event, generation.ImageProgress):
            return [ImageProgress(event.step, event.total, event.preview, event.candidate)]
        if isinstance(event, generation.SegmentFinished):
            return [self._finished(job, event)]
        reason = REASONS[event.reason]
        given = [part for part in job.prepared.plan if not isinstance(part, str)]
        cut = event.reason == "turns" and len(given) == len(job.prepared.plan)  # the model had not ended
        if reason == "end" and (job.truncated or cut):
            reason = "length"
        usage = Usage(sum(map(len, given)), job.cached, job.output_tokens, sum(len(part.images) for part in given),
                      job.output_images)  # fmt: skip
        return [Done(reason, usage, job.inspection)]

    def _finished(self, job: _Job, event: generation.SegmentFinished) -> Event:
        segment = event.segment
        generated = segment.generated
        assert generated is not None  # a segment that was just generated
        if isinstance(segment, Text):
            job.output_tokens += len(generated.ids)
            self.load.tokens += len(generated.ids)
            job.truncated = not generated.ids or generated.ids[-1] not in end_tokens(self._model)
            return TextDone(segment.text or "", job.truncated)
        assert isinstance(segment, Image)
        job.truncated = False
        job.output_tokens += self._model.config.num_image_tokens
        job.output_images += 1
        self.load.images += 1
        return ImageDone(generated.candidates)

    def _score(self) -> None:
        """A step of the texts to score that came first, in a state of their own."""
        if not self._scorings:
            return
        job = self._scorings[0]
        if job.adapter != self._adapter:
            if self._running:
                return
            self._use(job.adapter)
        if job.steps is None:
            batch = self._processor.collate([job.prompt], padding_side="left")
            job.steps = score_in_steps(self._model.prefill(batch, "dynamic"), [(0, ids) for ids in job.texts],
                                       SCORED_TOGETHER, SCORED_TOKENS)  # fmt: skip
            return
        try:
            next(job.steps)
        except StopIteration as ended:
            self._scorings.popleft()
            job.answer([scores.tolist() for scores in ended.value])


def _settle(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[list[list[float]]], found: list[list[float]] | Exception
) -> None:
    """Set the result of a future of the event loop, from the thread."""

    def settle() -> None:
        if future.done():
            return
        if isinstance(found, Exception):
            future.set_exception(found)
        else:
            future.set_result(found)

    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)


def make_engine(
    loaded: Loaded,
    name: str,
    config: ServeConfig,
    adapters: Mapping[str, Callable[[], None]] | None = None,
    without_adapter: Callable[[], None] = lambda: None,
) -> ModelEngine:
    """The engine of a model with the settings of a server; the other arguments are those of `ModelEngine`."""
    memory = None if config.memory_gib is None else config.memory_gib * 2**30
    return ModelEngine(loaded.model, loaded.processor, name, rows=config.rows, waiting=config.waiting, memory=memory,
                       tokens=config.tokens, images_together=config.images_together, adapters=adapters,
                       without_adapter=without_adapter)  # fmt: skip
