"""Continuous batching: documents that join and leave at any step get what they would get alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_interleaved import (
    Document,
    DocumentFinished,
    GenerationSettings,
    Image,
    ImageProgress,
    ImageSettings,
    MMInterleaved,
    MMInterleavedProcessor,
    SegmentFinished,
    Text,
    TextDelta,
    TextSettings,
)
from mm_interleaved.generation import ContinuousGenerator, InterleavedGenerator, continuous
from mm_interleaved.generation.continuous import NoRow

from ..conftest import make_image
from .test_interleaved import run, same

TEXT = TextSettings(max_new_tokens=6, min_new_tokens=2, num_beams=1)
IMAGE = ImageSettings(num_inference_steps=3, guidance_scale=2.0)


def story(seed: int, turns: int = 3, **image: Any) -> GenerationSettings:
    text = replace(TEXT, do_sample=True, repetition_penalty=1.3)
    return GenerationSettings(
        text, replace(IMAGE, seed=seed, **image), seed=seed, max_turns=turns, force_image=True, stop_at_eos=False
    )


def question() -> Document:
    return Document([Image(make_image(2)), Text("what is it?"), Text()])


JOBS: list[tuple[Callable[[], Document], GenerationSettings]] = [
    (lambda: Document([Text("a red house"), Image(make_image(1)), Text("and then")]), story(1)),
    (question, GenerationSettings(TEXT, IMAGE)),
    (question, GenerationSettings(replace(TEXT, num_beams=3, length_penalty=0.0), IMAGE)),
    (lambda: Document([Text("draw a dog"), Image()]),
     story(7, num_candidates=2, scheduler="DPMSolverMultistepScheduler")),
    (lambda: Document([Text("hello")]), story(5, turns=4, guidance_scale=1.0)),
    (lambda: Document([Text("one"), Image(), Text("two"), Image(), Text("three"), Image()]),
     replace(story(9, turns=3, num_inference_steps=5, preview_every=2), vary_noise=True)),
    (lambda: Document([Text("x"), Text(), Text("y"), Text()]),
     GenerationSettings(replace(TEXT, do_sample=True), IMAGE, seed=3)),
]  # fmt: skip


def alone(model: MMInterleaved, processor: MMInterleavedProcessor, number: int) -> tuple[list[Any], str]:
    """What a document gets from `InterleavedGenerator`, and how it ends."""
    document, chosen = JOBS[number]
    (made,), (end,) = run(InterleavedGenerator(model, processor, chosen), [document()])
    return made, end.reason


@pytest.fixture(scope="module")
def expected(model: MMInterleaved, processor: MMInterleavedProcessor) -> list[tuple[list[Any], str]]:
    return [alone(model, processor, number) for number in range(len(JOBS))]


class Run:
    """Jobs that join a generator when they can; what they get."""

    def __init__(self, generator: ContinuousGenerator) -> None:
        self.generator = generator
        self.made: dict[Any, list[Any]] = {}
        self.ends: dict[Any, DocumentFinished] = {}
        self.events: list[tuple[Any, Any]] = []

    def join(self, key: Any, document: Document, chosen: GenerationSettings) -> None:
        self.generator.join(key, self.generator.prepare(document), chosen)
        self.made[key] = []

    def step(self) -> None:
        for key, event in self.generator.step():
            self.events.append((key, event))
            if isinstance(event, SegmentFinished):
                generated = event.segment.generated
                assert generated is not None
                text = isinstance(event.segment, Text)
                self.made[key].append(list(generated.ids) if text else event.segment.source)
            elif isinstance(event, DocumentFinished):
                self.ends[key] = event

    def finish(self) -> None:
        for _ in range(1000):
            if not self.generator.running:
                return
            self.step()
        raise AssertionError("it does not end")


def check(job: Run, key: Any, number: int, expected: list[tuple[list[Any], str]]) -> None:
    made, reason = expected[number]
    assert len(job.made[key]) == len(made)
    assert all(same(a, b) for a, b in zip(job.made[key], made, strict=True))
    assert job.ends[key].reason == reason


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.lists(st.tuples(st.integers(0, len(JOBS) - 1), st.integers(0, 4)), min_size=2, max_size=9),
    leaving=st.integers(0, 8),
)
def test_whoever_joins_or_leaves_changes_nothing(
    model: MMInterleaved, processor: MMInterleavedProcessor, expected, order, leaving: int
) -> None:
    """Jobs join a few steps after each other, three rows serve them all, and one of them leaves early."""
    job = Run(ContinuousGenerator(model, processor, rows=3))
    for place, (number, wait) in enumerate(order):
        document, chosen = JOBS[number]
        while True:
            try:
                job.join(place, document(), chosen)
                break
            except NoRow:
                job.step()
        for _ in range(wait):
            job.step()
        if place == leaving:
            job.generator.leave(place)
    job.finish()
    for place, (number, _) in enumerate(order):
        if place != leaving or place in job.ends:
            check(job, place, number, expected)


def test_events_of_a_document_are_those_it_gets_alone(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    document, chosen = JOBS[5]
    job = Run(ContinuousGenerator(model, processor, rows=2))
    job.join("a", document(), chosen)
    job.join("b", *[make() if callable(make) else make for make in JOBS[0]])
    job.finish()
    mine = [event for key, event in job.events if key == "a"]
    reference = list(InterleavedGenerator(model, processor, chosen).run([document()]))
    assert [type(event) for event in mine] == [type(event) for event in reference]
    for a, b in zip(mine, reference, strict=True):
        if isinstance(a, ImageProgress):
            assert (a.candidate, a.step, a.total, a.preview is None) == (
                b.candidate,
                b.step,
                b.total,
                b.preview is None,
            )
        if isinstance(a, TextDelta):
            assert a.text == b.text


def test_a_conversation_goes_on_in_its_row(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """The second round needs only its own tokens, and gives what a fresh generator gives."""
    job = Run(ContinuousGenerator(model, processor, rows=2))
    start = [Text("a red house"), Image(make_image(1)), Text("and then")]
    job.join("first", Document(start), story(1))
    job.finish()
    begun = job.ends["first"].result
    read = job.generator.state.tokens_read, job.generator.state.images_read
    longer = Document([*begun.segments, Text("the end of it all"), Text()])
    job.join("second", longer, GenerationSettings(TEXT, IMAGE))
    job.finish()
    assert job.generator.tokens_reused > processor.num_image_tokens
    assert job.generator.state.images_read - read[1] <= 1  # the last image, which nobody had read
    (fresh,), _ = run(InterleavedGenerator(model, processor, GenerationSettings(TEXT, IMAGE)), [longer])
    assert job.made["second"] == fresh


def test_another_image_at_the_same_place_is_not_mistaken(
    model: MMInterleaved, processor: MMInterleavedProcessor
) -> None:
    chosen = GenerationSettings(TEXT, IMAGE)
    job = Run(ContinuousGenerator(model, processor, rows=1))
    for number in (2, 3):
        document = Document([Text("see"), Image(make_image(number)), Text("what is it?"), Text()])
        job.join(number, document, chosen)
        job.finish()
        (fresh,), _ = run(InterleavedGenerator(model, processor, chosen), [document])
        assert job.made[number] == fresh
    assert 0 < job.generator.tokens_reused < processor.num_image_tokens


def test_memory_of_images_is_used_again(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    job = Run(ContinuousGenerator(model, processor, rows=2))
    for number in range(6):
        job.join(number, Document([Image(make_image(number)), Image(make_image(number + 9)), Text("so"), Text()]),
                 GenerationSettings(TEXT, IMAGE))  # fmt: skip
        job.finish()
    assert len(job.generator.state.pyramids) <= 4
    assert job.generator.state.workspace.capacity.images <= 4


def test_no_row_is_left(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    job = Run(ContinuousGenerator(model, processor, rows=1))
    job.join("a", *[make() if callable(make) else make for make in JOBS[0]])
    with pytest.raises(NoRow):
        job.join("b", question(), GenerationSettings(TEXT, IMAGE))
    job.step()
    job.generator.leave("a")
    job.join("b", question(), GenerationSettings(TEXT, IMAGE))
    job.finish()
    assert list(job.ends) == ["b"]


def test_captured_steps_give_the_same(model: MMInterleaved, processor: MMInterleavedProcessor, expected) -> None:
    """With fixed memory for the denoising steps, as on a GPU, but without a capture."""
    job = Run(ContinuousGenerator(model, processor, rows=4))
    for number in (0, 3, 4, 5):
        document, chosen = JOBS[number]
        job.join(number, document(), replace(chosen, image=replace(chosen.image, cache_implementation="static")))
        job.step()
    job.finish()
    for number in (0, 3, 4, 5):
        check(job, number, number, expected)


@pytest.mark.gpu
def test_on_a_gpu(model: MMInterleaved, processor: MMInterleavedProcessor, expected) -> None:
    """Captured decode steps and denoising steps, in float32 without TF32."""
    on_gpu = model.to("cuda")
    torch.set_float32_matmul_precision("highest")
    try:
        job = Run(ContinuousGenerator(on_gpu, processor, rows=3))
        for number in (0, 1, 3):
            document, chosen = JOBS[number]
            job.join(number, document(), chosen)
            job.step()
        job.finish()
        for number in (1,):
            assert job.made[number] == expected[number][0]
        assert {*job.ends} == {0, 1, 3}
    finally:
        model.to("cpu")


def test_long_prompts_are_processed_beside_the_texts_of_others(
    model: MMInterleaved, processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt with images takes several steps, in each of which a text that runs gets a token."""
    monkeypatch.setattr(continuous, "PREFILL_TOKENS", 24)
    monkeypatch.setattr(continuous, "LEAST_PREFILL", 8)
    words = "a red house and a dog by the lake "
    long = Document([Text(words * 5), Image(make_image(1)), Text(words * 3), Image(make_image(2)), Text(words), Text()])
    chosen = GenerationSettings(replace(TEXT, max_new_tokens=40, min_new_tokens=40), IMAGE)
    (made,), _ = run(InterleavedGenerator(model, processor, chosen), [long])
    tokens: list[int] = []
    hook = model.language_model.layers[0].mlp.gate_proj.register_forward_hook(
        lambda _m, a, _o: tokens.append(a[0].shape[1])
    )
    job = Run(ContinuousGenerator(model, processor, rows=3))
    job.join("running", question(), replace(chosen, text=replace(chosen.text, max_new_tokens=100, min_new_tokens=100)))
    job.step()
    running = [work for work in job.generator._work.values() if isinstance(work, continuous._Writing)]
    job.join("long", long, chosen)
    job.join("also long", long, chosen)
    tokens.clear()
    steps = 0
    while len(job.generator._work) < 3:
        before = len(running[0].text.ids)
        job.step()
        steps += 1
        assert len(running[0].text.ids) == before + 1
    count = model.config.num_image_tokens
    assert steps > 5
    assert max(tokens) <= 24 + 1 + count
    job.finish()
    hook.remove()
    assert job.made["long"] == job.made["also long"] == made


def test_a_document_may_leave_while_its_prompt_is_processed(
    model: MMInterleaved, processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous, "PREFILL_TOKENS", 2)
    monkeypatch.setattr(continuous, "LEAST_PREFILL", 2)
    job = Run(ContinuousGenerator(model, processor, rows=1))
    job.join("first", Document([Text("a red house " * 20), Text()]), GenerationSettings(TEXT, IMAGE))
    job.step()
    assert job.generator.writes
    job.generator.leave("first")
    assert not job.generator.writes
    job.join("second", question(), JOBS[1][1])
    job.finish()
    assert job.made["second"] == alone(model, processor, 1)[0]
