"""Text generation: greedy search, sampling, beams (docs/model.md, "Text generation")."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mm_interleaved import (
    TEXT_PRESETS,
    Batch,
    Document,
    Image,
    MMInterleaved,
    MMInterleavedProcessor,
    Text,
    TextSettings,
)
from mm_interleaved.generation.settings import GenerationSettings, override
from mm_interleaved.generation.text import write

from ..conftest import make_image

EOS = 2


def prompts(processor: MMInterleavedProcessor, side: str = "left") -> Batch:
    documents = [
        Document([Image(make_image(1)), Text("a red house")]),
        Document([Text("hello")]),
        Document([Text("see"), Image(make_image(2)), Image(make_image(3)), Text("and this and that")]),
    ]
    return processor(documents, padding_side=side)


@pytest.fixture
def scripted(model: MMInterleaved) -> Callable[[Callable[[int], dict[int, float]]], MMInterleaved]:
    """A model whose next-token scores are given by step: {token: logit}, all others far below."""

    def make(script: Callable[[int], dict[int, float]]) -> MMInterleaved:
        scripted = copy.deepcopy(model)
        steps = iter(range(1000))

        def head(hidden: Tensor) -> Tensor:
            logits = torch.full((*hidden.shape[:-1], model.config.vocab_size), -30.0)
            for token, value in script(next(steps)).items():
                logits[..., token] = value
            return logits

        scripted.lm_head.forward = head
        return scripted

    return make


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_equals_one_forward_per_token(
    model: MMInterleaved, processor: MMInterleavedProcessor, side: str
) -> None:
    """No caches in the reference: the whole row is read again for every token. Ragged batch, padded on either side."""
    batch = prompts(processor, side)
    settings = TextSettings(max_new_tokens=9, min_new_tokens=9, num_beams=1)
    texts = [row[0].ids for row in model.generate_text(batch, settings)]
    first_image = [0, 1, 1]
    for row, text in enumerate(texts):
        ids = batch.input_ids[row][batch.attention_mask[row] == 1]
        count = int((batch.image_rows == row).sum())
        pixels = batch.pixel_values[first_image[row] : first_image[row] + count]
        for token in text:
            logits = model(ids[None], pixel_values=pixels).logits[0, -1]
            logits[[EOS, model.config.soi_token_id]] = -torch.inf
            assert int(logits.argmax()) == token
            ids = torch.cat([ids, torch.tensor([token])])


def test_rows_do_not_depend_on_their_batch(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    batch = prompts(processor)
    for settings in (
        TextSettings(max_new_tokens=8, num_beams=1),
        TextSettings(max_new_tokens=8, num_beams=3),
        TextSettings(max_new_tokens=8, num_beams=1, do_sample=True),
    ):
        together = model.generate_text(batch, settings)
        alone = processor(Document([Text("hello")]))
        assert model.generate_text(alone, settings)[0][0].ids == together[1][0].ids


def test_sampling_is_decided_by_the_generator(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    batch = prompts(processor)
    settings = TextSettings(max_new_tokens=12, num_beams=1, do_sample=True, top_k=0, top_p=1.0)

    def draw(seed: int) -> list:
        return model.generate_text(batch, settings, torch.Generator().manual_seed(seed))

    assert draw(1) == draw(1) != draw(2)


def test_sampling_follows_the_distribution(scripted, processor: MMInterleavedProcessor) -> None:
    model = scripted(lambda step: {10: torch.tensor(0.5).log().item(), 11: torch.tensor(0.3).log().item(),
                                   12: torch.tensor(0.2).log().item()})  # fmt: skip
    settings = TextSettings(max_new_tokens=400, min_new_tokens=0, num_beams=1, do_sample=True, top_k=0, top_p=1.0)
    ids = model.generate_text(processor(Document([Text("a")])), settings)[0][0].ids
    for token, share in ((10, 0.5), (11, 0.3), (12, 0.2)):
        assert ids.count(token) / 400 == pytest.approx(share, abs=0.08)
    narrow = model.generate_text(processor(Document([Text("a")])), TextSettings(
        max_new_tokens=100, min_new_tokens=0, num_beams=1, do_sample=True, top_k=2, top_p=1.0))[0][0].ids  # fmt: skip
    assert set(narrow) == {10, 11}
    nucleus = model.generate_text(processor(Document([Text("a")])), TextSettings(
        max_new_tokens=100, min_new_tokens=0, num_beams=1, do_sample=True, top_k=0, top_p=0.4))[0][0].ids  # fmt: skip
    assert set(nucleus) == {10}


def test_several_samples_of_a_prompt(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    settings = TextSettings(max_new_tokens=6, num_beams=1, do_sample=True, num_return_sequences=3)
    rows = model.generate_text(prompts(processor), settings)
    assert [len(row) for row in rows] == [3, 3, 3]
    assert len({tuple(t.ids) for t in rows[0]}) > 1


@pytest.mark.parametrize("end", ["eos", "soi"])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_true_end_token_is_kept(scripted, processor: MMInterleavedProcessor, end: str, beams: int) -> None:
    config = processor
    token = EOS if end == "eos" else config.soi_token_id
    model = scripted(lambda step: {10: 1.0, 11: 0.0} if step < 3 else {token: 5.0, 10: 0.0})
    settings = TextSettings(max_new_tokens=20, min_new_tokens=0, num_beams=beams)
    text = model.generate_text(processor(Document([Text("a")])), settings)[0][0]
    assert text.end == token
    assert text.ids == [10, 10, 10]
    assert text.all_ids == [10, 10, 10, token]


def test_end_tokens_are_blocked_for_the_first_seven(scripted, processor: MMInterleavedProcessor) -> None:
    """The original's min_length of 8 counts <s>, so seven tokens come before any end token, `</s>` or SOI."""
    soi = processor.soi_token_id
    model = scripted(lambda step: {EOS: 9.0, soi: 8.0, 10: 0.0})
    text = model.generate_text(processor(Document([Text("a")])), TextSettings(num_beams=1))[0][0]
    assert (text.ids, text.end) == ([10] * 7, EOS)
    text = model.generate_text(processor(Document([Text("a")])), TextSettings(num_beams=2))[0][0]
    assert (text.ids, text.end) == ([10] * 7, EOS)
    text = model.generate_text(processor(Document([Text("a")])), TextSettings(num_beams=1, min_new_tokens=0))[0][0]
    assert (text.ids, text.end) == ([], EOS)


def test_repetition_penalty_counts_what_was_written_not_the_prompt(scripted, processor: MMInterleavedProcessor) -> None:
    (word,) = processor.tokenizer.convert_tokens_to_ids(["▁red"])
    model = scripted(lambda step: {word: 2.0, 11: 1.9, 12: 1.8})
    settings = TextSettings(max_new_tokens=3, min_new_tokens=0, num_beams=1, repetition_penalty=1.3)
    ids = model.generate_text(processor(Document([Text("red red red")])), settings)[0][0].ids
    assert ids == [word, 11, 12]


def test_length_penalty_counts_the_start_but_not_the_end(scripted, processor: MMInterleavedProcessor) -> None:
    model = scripted(lambda step: {10: 0.0} if step < 2 else {EOS: 0.0})
    for penalty in (0.0, 1.0, 2.0):
        settings = TextSettings(max_new_tokens=5, min_new_tokens=0, num_beams=1 + 1, length_penalty=penalty)
        best = model.generate_text(processor(Document([Text("a")])), settings)[0][0]
        assert best.ids == [10, 10]
        assert best.score == pytest.approx(0.0, abs=1e-3)
        model = scripted(lambda step: {10: 0.0, 11: 0.0} if step < 2 else {EOS: 0.0})
        best = model.generate_text(processor(Document([Text("a")])), settings)[0][0]
        assert best.score == pytest.approx(2 * torch.tensor(0.5).log().item() / 3**penalty, rel=1e-3)
        model = scripted(lambda step: {10: 0.0} if step < 2 else {EOS: 0.0})


def test_beams_find_what_greedy_misses(scripted, processor: MMInterleavedProcessor) -> None:
    """Greedy is lured by the first token; the better pair starts with the second best."""
    lure, good = 10, 11

    def script(step: int) -> dict[int, float]:
        return {lure: 0.1, good: 0.0} if step == 0 else {EOS: 0.0}

    model = scripted(script)
    head, history = model.lm_head.forward, []

    def with_history(hidden: Tensor) -> Tensor:
        logits = head(hidden)
        if len(history) == 1:  # second step: the lure leads nowhere, its end is unlikely
            logits[0, EOS], logits[0, 12:60] = -3.0, 0.0
        history.append(len(logits))
        return logits

    model.lm_head.forward = with_history
    prompt = processor(Document([Text("a")]))
    best = model.generate_text(prompt, TextSettings(max_new_tokens=2, min_new_tokens=0, num_beams=2))[0][0]
    assert best.ids == [good]


def test_steps_of_finished_rows_are_marked(scripted, processor: MMInterleavedProcessor) -> None:
    model = scripted(lambda step: {10: 0.0} if step < 2 else {EOS: 0.0})
    context = model.prefill(prompts(processor))
    steps = list(write(context, TextSettings(min_new_tokens=0, num_beams=1), [torch.Generator()] * 3,
                       active=torch.tensor([True, False, True]), limits=[1, 9, 9]))  # fmt: skip
    assert [s.active.tolist() for s in steps] == [[True, False, True], [False, False, True], [False, False, True]]
    assert steps[1].tokens.tolist() == [model.config.pad_token_id] * 2 + [10]


def test_limits_and_banned_tokens(scripted, processor: MMInterleavedProcessor) -> None:
    model = scripted(lambda step: {10: 1.0, 11: 0.0})
    context = model.prefill(processor(Document([Text("a")])))
    settings = TextSettings(max_new_tokens=4, min_new_tokens=0, num_beams=1)
    steps = list(write(context, settings, [torch.Generator()], banned=[10]))
    assert [int(s.tokens) for s in steps] == [11] * 4


# ---- settings


def test_presets_are_the_originals() -> None:
    """The table of docs/model.md, "Text generation": max new, min length, beams, length and repetition penalty."""
    table = {
        "default": (30, 8, 5, 1.0, 1.0),
        "caption": (20, 8, 5, 1.0, 1.0),
        "vqa": (10, 0, 3, 0.0, 1.0),
        "paragraph": (90, 90, 5, 1.0, 1.2),
        "interleaved": (90, 8, 1, 1.0, 1.3),
    }
    assert table.keys() == TEXT_PRESETS.keys()
    for name, (longest, shortest, beams, length, repetition) in table.items():
        preset = TEXT_PRESETS[name]
        assert preset == TextSettings(
            max_new_tokens=longest, min_new_tokens=max(shortest - 1, 0), num_beams=beams, length_penalty=length,
            repetition_penalty=repetition, do_sample=name == "interleaved",
        )  # fmt: skip
    assert (TEXT_PRESETS["interleaved"].top_p, TEXT_PRESETS["interleaved"].top_k) == (0.9, 50)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"num_beams": 2, "do_sample": True}, "do_sample needs num_beams=1"),
        ({"temperature": 0}, "temperature must be at least 1e-6, not 0.0. Set do_sample=False"),
        ({"top_p": 0}, "top_p must be greater than 0, not 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 needs as many beams"),
    ],
)
def test_impossible_settings(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TextSettings(**change)


def test_override_finds_the_right_place() -> None:
    settings = override(GenerationSettings(), seed=9, top_p=0.5, guidance_scale=2.0, max_turns=3, temperature=None)
    assert (settings.seed, settings.image.seed, settings.text.top_p) == (9, 9, 0.5)
    assert (settings.image.guidance_scale, settings.max_turns, settings.text.temperature) == (2.0, 3, 1.0)
    with pytest.raises(ValueError, match="unknown setting 'colour'"):
        override(settings, colour=1)
