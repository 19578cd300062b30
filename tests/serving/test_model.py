"""The engine of a model: answers are those of the generator, whoever else is served."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from mm_interleaved import (
    Document,
    GenerationSettings,
    Image,
    ImageSettings,
    InputError,
    MMInterleaved,
    MMInterleavedProcessor,
    Text,
    TextSettings,
)
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.serving import engine as events
from mm_interleaved.serving.engine import DeadlineExceeded, EngineError, GenerationRequest, Overloaded, Unavailable
from mm_interleaved.serving.model import ModelEngine

from ..conftest import make_image
from ..generation.test_interleaved import run, same

SETTINGS = GenerationSettings(
    TextSettings(max_new_tokens=6, min_new_tokens=2, num_beams=1, do_sample=True),
    ImageSettings(num_inference_steps=3, guidance_scale=2.0), seed=3,
)  # fmt: skip


def with_engine(model: MMInterleaved, processor: MMInterleavedProcessor, work: Any, **options: Any) -> Any:
    """Run `work(engine)` with an engine that is started and stopped."""

    async def whole() -> Any:
        engine = ModelEngine(model, processor, "m", **options)
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.stop(1.0)
            assert not engine.alive

    return asyncio.run(whole())


def request(number: int) -> GenerationRequest:
    document = Document([Text(f"number {number}"), Image(make_image(number)), Text(), Image(), Text("so"), Text()])
    return GenerationRequest(document, replace(SETTINGS, seed=number, image=replace(SETTINGS.image, seed=number)))


async def collect(engine: ModelEngine, asked: GenerationRequest) -> tuple[list[Any], list[Any]]:
    """All events of a request, and its texts and images."""
    found = [event async for event in await engine.submit(asked)]
    made = [e.text if isinstance(e, events.TextDone) else e.images[0] for e in found
            if isinstance(e, (events.TextDone, events.ImageDone))]  # fmt: skip
    return found, made


async def drain(stream: events.Stream) -> None:
    async for _ in stream:
        pass


def test_answers_are_those_of_the_generator(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    async def work(engine: ModelEngine) -> Any:
        return await asyncio.gather(*(collect(engine, request(number)) for number in range(5)))

    answers = with_engine(model, processor, work, rows=2)
    for number, (found, made) in enumerate(answers):
        asked = request(number)
        (_,), (end,) = run(InterleavedGenerator(model, processor, asked.settings), [asked.document])
        expected = [s.text if isinstance(s, Text) else s.source for s in end.result.generated]
        assert len(made) == len(expected)
        assert all(a == b if isinstance(a, str) else same(a, b) for a, b in zip(made, expected, strict=True))
        assert isinstance(found[0], events.Started)
        assert found[-1].usage.output_images == 1
        assert found[-1].usage.input_images == 1
        said = "".join(e.text for e in found if isinstance(e, events.TextDelta))
        whole = "".join(text for text in made if isinstance(text, str))
        assert said.replace("\ufffd", "") == whole.replace("\ufffd", "")  # half a character at an end is not streamed


def test_a_cancelled_request_frees_its_row(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    async def work(engine: ModelEngine) -> None:
        slow = replace(SETTINGS, image=replace(SETTINGS.image, num_inference_steps=900))
        stream = await engine.submit(GenerationRequest(Document([Text("a"), Image()]), slow))
        while not isinstance(await stream.next(), events.ImageProgress):
            pass
        stream.cancel()
        with pytest.raises(EngineError, match="cancelled"):
            await drain(stream)
        assert (engine.load.running, engine.load.waiting) == (0, 0)
        _, made = await collect(engine, request(1))
        assert len(made) == 3

    with_engine(model, processor, work, rows=1)


def test_limits(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    async def work(engine: ModelEngine) -> None:
        slow = replace(SETTINGS, image=replace(SETTINGS.image, num_inference_steps=900))
        asked = GenerationRequest(Document([Text("a"), Image()]), slow, seconds=1.5)
        first, second = await engine.submit(asked), await engine.submit(asked)
        await first.next()
        with pytest.raises(Overloaded, match="waiting"):
            await engine.submit(asked)
        for stream in (first, second):
            with pytest.raises(DeadlineExceeded):
                await drain(stream)
        with pytest.raises(InputError, match="tokens are more than"):
            await engine.submit(GenerationRequest(Document([Text("a " * 5000)]), SETTINGS))
        assert (engine.load.running, engine.load.waiting) == (0, 0)

    with_engine(model, processor, work, rows=1, waiting=1)


def test_scores_are_those_of_the_model(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    async def work(engine: ModelEngine) -> Any:
        return await engine.score(Document([Text("a red")]), texts)

    texts = [" house stands", "a", "x\u00e9 \U0001f600.", "a red house and " * 40, *["so"] * 9]
    ids = [processor.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    prompt = processor.collate([processor.encode([Text("a red")])], padding_side="left")
    expected = model.score(prompt, [ids])[0]
    for text, scored, score in zip(texts, with_engine(model, processor, work), expected, strict=True):
        assert "".join(scored.tokens) == text
        assert sum(scored.log_probabilities) == pytest.approx(score, abs=2e-3)


def test_scores_end_when_nobody_waits_or_time_is_over(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """Between two steps; others are served meanwhile."""

    async def work(engine: ModelEngine) -> None:
        many = ["a red house and " * 100] * 200
        asked = asyncio.create_task(engine.score(Document([]), many))
        _, made = await asyncio.wait_for(collect(engine, request(1)), 20)
        assert len(made) == 3
        assert not asked.done()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
            await engine.score(Document([]), many, seconds=0.2)
        assert len(await asyncio.wait_for(engine.score(Document([]), ["a dog"]), 20)) == 1
        assert engine.load.waiting == 0

    with_engine(model, processor, work, rows=2)


def test_adapters_take_turns(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    used: list[str | None] = []
    adapters = {name: lambda name=name: used.append(name) for name in ("one", "two")}

    async def work(engine: ModelEngine) -> None:
        names = [None, "one", "one", None, "two"]
        # one by one, since documents that are submitted together may be prepared in another order
        streams = [await engine.submit(replace(request(i), adapter=name)) for i, name in enumerate(names)]
        await asyncio.gather(*map(drain, streams))
        with pytest.raises(InputError, match="no adapter 'three'"):
            await engine.submit(replace(request(0), adapter="three"))

    with_engine(model, processor, work, rows=4, adapters=adapters, without_adapter=lambda: used.append(None))
    assert used == ["one", None, "two"]


def test_memory_limits_the_rows(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    row = ModelEngine(model, processor, "m", rows=1).row_bytes
    assert ModelEngine(model, processor, "m", rows=4, memory=2.5 * row).load.rows == 2
    with pytest.raises(InputError, match="fewer 'tokens'"):
        ModelEngine(model, processor, "m", memory=0.5 * row)


def test_what_breaks_a_step_ends_its_requests_only(
    model: MMInterleaved, processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: ModelEngine) -> None:
        with monkeypatch.context() as patch:

            def broken(*_: Any, **__: Any) -> None:
                raise RuntimeError("a secret of the device")

            patch.setattr(type(model), "decode", broken)
            with pytest.raises(EngineError, match=r"generation failed \(RuntimeError\)"):
                await collect(engine, request(0))
        _, made = await collect(engine, request(1))
        assert len(made) == 3

    with_engine(model, processor, work)


def test_after_a_failed_step_others_are_served(
    model: MMInterleaved, processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request whose image cannot be decoded, which is the last step of its image."""

    async def work(engine: ModelEngine) -> None:
        def out_of_memory(*_: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(model.image_decoder, "decode", out_of_memory)
            with pytest.raises(EngineError, match="out of memory"):
                await drain(await engine.submit(request(1)))
        assert engine.alive
        assert (engine.load.running, engine.load.waiting, engine.load.failed) == (0, 0, 1)
        _, made = await collect(engine, request(1))
        assert len(made) == 3

    with_engine(model, processor, work, rows=2)


class OddError(Exception):
    """An error that nothing expects."""


@pytest.mark.parametrize("error", [OddError, KeyError, MemoryError, NotImplementedError, OSError, StopIteration])
@pytest.mark.parametrize("place", ["model", "join", "leave", "adapter"])
def test_the_engine_recovers_from_any_error(
    model: MMInterleaved, processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch, error: type[Exception],
    place: str,
) -> None:  # fmt: skip
    async def work(engine: ModelEngine) -> None:
        adapter = None
        with monkeypatch.context() as patch:

            def broken(*_: Any, **__: Any) -> None:
                patch.undo()
                raise error("a secret of the device")

            where = {"model": (type(model), "decode"), "join": (engine._generator, "_place"),
                     "leave": (engine._generator, "leave")}  # fmt: skip
            if place == "adapter":
                patch.setitem(engine._switches, "odd", broken)
                adapter = "odd"
            else:
                patch.setattr(*where[place], broken)
            stream = await engine.submit(replace(request(0), adapter=adapter))
            if place == "leave":
                await stream.next()
                stream.cancel()
            with pytest.raises(EngineError, match="cancelled" if place == "leave" else "generation failed") as caught:
                await asyncio.wait_for(drain(stream), 20)
            assert "secret" not in str(caught.value)
        _, made = await asyncio.wait_for(collect(engine, request(1)), 20)
        assert len(made) == 3
        assert engine.alive
        assert (engine.load.running, engine.load.waiting) == (0, 0)

    with_engine(model, processor, work, rows=1)


def test_scores_that_break_are_answered(
    model: MMInterleaved, processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: ModelEngine) -> None:
        with monkeypatch.context() as patch:

            def broken(*_: Any, **__: Any) -> None:
                patch.undo()
                raise OddError

            patch.setattr(type(model), "compute_logits", broken)
            with pytest.raises(EngineError, match=r"generation failed \(OddError\)"):
                await asyncio.wait_for(engine.score(Document([]), ["a dog"]), 20)
        assert len(await asyncio.wait_for(engine.score(Document([]), ["a dog"]), 20)) == 1

    with_engine(model, processor, work)


def test_a_model_that_does_not_work_any_more_ends_the_engine(
    model: MMInterleaved, processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an error of the GPU: a token cannot be processed after the failure either."""

    async def work(engine: ModelEngine) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise OddError

        monkeypatch.setattr(type(model), "decode", broken)
        asked = asyncio.gather(*(collect(engine, request(n)) for n in range(3)), engine.score(Document([]), ["a"]),
                               return_exceptions=True)  # fmt: skip
        assert all(isinstance(found, EngineError) for found in await asyncio.wait_for(asked, 20))
        assert not engine.alive
        with pytest.raises(Unavailable, match="because of an error"):
            await engine.submit(request(1))
        with pytest.raises(Unavailable, match="because of an error"):
            await engine.score(Document([]), ["a dog"])

    with_engine(model, processor, work, rows=1)


def test_an_answer_that_a_limit_of_turns_ends_is_not_complete(
    model: MMInterleaved, processor: MMInterleavedProcessor
) -> None:
    async def work(engine: ModelEngine) -> list[Any]:
        text = TextSettings(max_new_tokens=6, num_beams=1)
        continued = GenerationSettings(text, SETTINGS.image, max_turns=1, force_image=True)
        slots = replace(continued, max_turns=2)
        asked = [GenerationRequest(Document([Text("a"), *more]), settings)
                 for more, settings in (([], continued), ([Image()], replace(slots, max_turns=1)))]  # fmt: skip
        return [(await collect(engine, one))[0][-1].reason for one in asked]

    assert with_engine(model, processor, work) == ["length", "end"]


def test_limits_of_scores(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    async def work(engine: ModelEngine) -> None:
        with pytest.raises(InputError, match="of the model's context"):
            await engine.score(Document([]), ["a dog " * engine.limits.context])
        asked = (engine.score(Document([]), ["a dog"]) for _ in range(20))
        scores = await asyncio.gather(*asked, return_exceptions=True)
        refused = [isinstance(score, Overloaded) for score in scores]
        assert 0 < sum(refused) < 20
        assert engine.load.waiting == 0

    with_engine(model, processor, work, rows=1, waiting=4)
