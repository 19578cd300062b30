"""Decoding over fixed memory against its plain twin, whose caches grow: the same texts, and the same context after.

On a CPU the step is called directly instead of replayed from a CUDA graph; `tests/test_gpu.py` has the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from mm_interleaved import (
    Batch,
    GenerationSettings,
    ImageSettings,
    MMInterleaved,
    MMInterleavedConfig,
    MMInterleavedProcessor,
    TextSettings,
)
from mm_interleaved.generation import Context, InterleavedGenerator, static, static_text
from mm_interleaved.generation.static import Room, StaticDecoder, borrow, why_not_static
from mm_interleaved.generation.static_pictures import read_images
from mm_interleaved.generation.text import write
from mm_interleaved.ops.mmfs_attention import HAS_TRITON

from ..conftest import awaken
from .test_interleaved import ragged, run, same
from .test_text import prompts

Texts = list[list[tuple[list[int], int | None]]]


def texts(model: MMInterleaved, batch: Batch, settings: TextSettings, kind: str, seed: int = 5) -> Texts:
    settings = replace(settings, cache_implementation=kind)
    rows = model.generate_text(batch, settings, torch.Generator().manual_seed(seed))
    return [[(t.ids, t.end) for t in row] for row in rows]


GREEDY = TextSettings(max_new_tokens=21, min_new_tokens=2, num_beams=1, repetition_penalty=1.3)
KINDS = {
    "greedy": GREEDY,
    "sampling": replace(GREEDY, do_sample=True, temperature=1.4, top_p=0.95),
    "three samples": replace(GREEDY, do_sample=True, num_return_sequences=3),
    "beams": TextSettings(max_new_tokens=12, num_beams=3, num_return_sequences=2),
    "beams that may end at once": TextSettings(max_new_tokens=30, min_new_tokens=0, num_beams=4, length_penalty=0.0,
                                               repetition_penalty=1.2),
}  # fmt: skip


@pytest.fixture(scope="module")
def ending(model: MMInterleaved) -> MMInterleaved:
    """A model that likes to end its texts."""
    eager = copy.deepcopy(model)
    with torch.no_grad():
        eager.lm_head.head.bias[model.config.eos_token_id] += 6
        eager.lm_head.new.bias += 10
    return eager


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_same_texts(model: MMInterleaved, ending: MMInterleaved, processor, kind: str, side: str) -> None:
    """Ragged batches: rows with no, one and two pictures, padded on either side; with and without early ends."""
    batch = prompts(processor, side)
    for m in (model, ending):
        assert texts(m, batch, KINDS[kind], "static") == texts(m, batch, KINDS[kind], "dynamic")
    ends = [t[1] for row in texts(ending, batch, KINDS[kind], "static") for t in row]
    assert any(e is not None for e in ends)


def test_room_for_more_pictures_than_there_are(ending: MMInterleaved, processor, monkeypatch) -> None:
    """As on a GPU, where a session does not record anew for each of its first pictures."""
    monkeypatch.setitem(static.SLOTS, "cpu", 8)
    batch = prompts(processor)
    assert Room.needed(ending.read(batch), 1, 5).slots == 8
    for settings in KINDS.values():
        assert texts(ending, batch, settings, "static") == texts(ending, batch, settings, "dynamic")


def test_room_for_many_rows_is_not_a_thousand_columns_each(model: MMInterleaved, processor, monkeypatch) -> None:
    monkeypatch.setitem(static.COLUMNS, "cpu", 1024)
    context = model.read(prompts(processor))
    assert Room.needed(context, 1, 5).columns == 1024
    many = Room.needed(context, 50, 5)
    assert (many.rows, many.columns) == (150, 64 * (-(-(context.mask.shape[1] + 5) // 64)))


@pytest.mark.parametrize("window", [2, 50])
def test_how_far_ahead_does_not_matter(ending: MMInterleaved, processor, monkeypatch, window: int) -> None:
    monkeypatch.setitem(static_text.WINDOW, "cpu", window)
    for settings in KINDS.values():
        batch = prompts(processor)
        assert texts(ending, batch, settings, "static") == texts(ending, batch, settings, "dynamic")


def test_scores_of_beams(ending: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    batch, settings = prompts(processor), replace(KINDS["beams"], cache_implementation="static")
    found, expected = (
        ending.generate_text(batch, replace(settings, cache_implementation=kind)) for kind in ("static", "dynamic")
    )
    for a, b in zip(found, expected, strict=True):
        assert [t.score for t in a] == pytest.approx([t.score for t in b], rel=1e-5)


@pytest.mark.parametrize("kind", ["greedy", "sampling"])
def test_the_context_afterwards(ending: MMInterleaved, processor, kind: str) -> None:
    """Keys, values, hidden states, logits, masks and generators are as after the plain loop."""
    states = []
    for implementation in ("static", "dynamic"):
        context = ending.read(prompts(processor))
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        settings = replace(KINDS[kind], cache_implementation=implementation)
        steps = list(write(context, settings, generators, limits=torch.tensor([3, 20, 6])))
        context.flush()
        states.append((context, steps, generators))
    (a, steps, ours), (b, expected, theirs) = states
    assert len(steps) == len(expected)
    for x, y in zip(steps, expected, strict=True):
        assert torch.equal(x.tokens, y.tokens)
        assert torch.equal(x.active, y.active)
        torch.testing.assert_close(x.logits[x.active], y.logits[x.active], rtol=1e-5, atol=1e-5)
    assert torch.equal(a.mask, b.mask)
    assert a.tokens_read == b.tokens_read
    real = a.mask == 1
    torch.testing.assert_close(torch.cat(a.hidden, 1)[real], torch.cat(b.hidden, 1)[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.last, b.last, rtol=1e-5, atol=1e-5)
    for x, y in zip(a.cache.layers, b.cache.layers, strict=True):
        torch.testing.assert_close(x.keys.transpose(1, 2)[real], y.keys.transpose(1, 2)[real], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.values.transpose(1, 2)[real], y.values.transpose(1, 2)[real], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(x.get_state(), y.get_state()) for x, y in zip(ours, theirs, strict=True))


def test_stopping_in_the_middle(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """Whoever stops listening finds what was shown in the context, and no more; the decoder is free again."""
    context = model.read(prompts(processor))
    before = context.mask.shape[1]
    steps = write(context, replace(GREEDY, cache_implementation="static"), [torch.Generator()] * 3)
    for _ in range(3):
        next(steps)
    steps.close()
    assert context.mask.shape[1] == before + 3
    assert torch.cat(context.hidden, 1).shape[1] == before + 3
    texts(model, prompts(processor), GREEDY, "static")


def test_two_at_a_time(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    settings = replace(GREEDY, cache_implementation="static")
    contexts = [model.read(prompts(processor)) for _ in range(2)]
    pair = [write(c, settings, [torch.Generator()] * 3) for c in contexts]
    for a, b in zip(*pair, strict=True):
        assert torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("sample", [False, True])
def test_sessions(model: MMInterleaved, processor: MMInterleavedProcessor, sample: bool) -> None:
    """Several rounds of text and pictures in a ragged batch, with limits and forced pictures."""
    results = []
    for kind in ("static", "dynamic"):
        text = replace(GREEDY, max_new_tokens=9, do_sample=sample, cache_implementation=kind)
        settings = GenerationSettings(text, ImageSettings(num_inference_steps=2, guidance_scale=2.0), max_turns=6,
                                      force_image=True, stop_at_eos=False, max_tokens=22)  # fmt: skip
        generator = InterleavedGenerator(model, processor, settings)
        made, _ = run(generator, ragged())
        generator.context.flush()
        results.append((made, generator.context.mask))
    (found, mask), (expected, wanted) = results
    assert all(same(x, y) for a, b in zip(found, expected, strict=True) for x, y in zip(a, b, strict=True))
    assert torch.equal(mask, wanted)


def test_decoders_are_kept_until_weights_move(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    mine = copy.deepcopy(model)
    room = Room.needed(mine.read(prompts(processor)), 1, 5)
    with borrow(mine, room) as first, borrow(mine, room) as second:
        assert first is not second
    with borrow(mine, room) as again:
        assert again is second
    mine.lm_head.head.weight = torch.nn.Parameter(mine.lm_head.head.weight + 0)
    with borrow(mine, room) as other:
        assert other is not first
        assert other is not second


def test_weights_that_change_in_place_count(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    mine = copy.deepcopy(model)
    texts(mine, prompts(processor), GREEDY, "static")
    with torch.no_grad():
        for parameter in mine.language_model.parameters():
            parameter.mul_(1.3)
    assert texts(mine, prompts(processor), GREEDY, "static") == texts(mine, prompts(processor), GREEDY, "dynamic")


def other_model(config: MMInterleavedConfig, kind: str, **changes: object) -> MMInterleaved:
    config = copy.deepcopy(config)
    old = config.text_config
    same_sizes = {name: getattr(old, name) for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size", "vocab_size",
        "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")}  # fmt: skip
    config.text_config = AutoConfig.for_model(kind, **same_sizes, num_key_value_heads=1, **changes)
    torch.manual_seed(1)
    return awaken(MMInterleaved(config)).eval()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_other_language_models(debug_config: MMInterleavedConfig, processor, kind: str) -> None:
    """Fewer key heads than heads; biases (Qwen2), norms of queries and keys (Qwen3)."""
    model = other_model(debug_config, kind, **({"sliding_window": None} if kind == "mistral" else {}))
    for settings in (GREEDY, KINDS["beams"]):
        batch = prompts(processor)
        assert texts(model, batch, settings, "static") == texts(model, batch, settings, "dynamic")


def test_what_cannot_be_static_says_so(debug_config: MMInterleavedConfig, processor, caplog) -> None:
    window = other_model(debug_config, "mistral", sliding_window=6)
    assert "6 tokens" in why_not_static(window)
    with pytest.raises(ValueError, match="is not possible for this model: its attention looks back 6 tokens"):
        texts(window, prompts(processor), GREEDY, "static")
    texts(window, prompts(processor), GREEDY, "auto")
    with pytest.raises(ValueError, match="must be one of auto, static, dynamic, not 'fixed'"):
        TextSettings(cache_implementation="fixed")


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Decoders that use the Triton kernels, in the interpreter; returns how many were made."""
    made = []

    class Kernels(StaticDecoder):
        def __init__(self, model: MMInterleaved, room: Room) -> None:
            made.append(room)
            super().__init__(model, room, kernels=True)

    monkeypatch.setattr(static, "StaticDecoder", Kernels)
    return lambda: len(made)


@pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="for Triton's interpreter")
@pytest.mark.parametrize("kind", ["greedy", "beams"])
def test_through_kernels(model: MMInterleaved, processor, with_kernels, kind: str) -> None:
    mine = copy.deepcopy(model)
    settings = replace(KINDS[kind], max_new_tokens=4, min_new_tokens=4)
    batch = prompts(processor)
    assert texts(mine, batch, settings, "static") == texts(mine, batch, settings, "dynamic")
    assert with_kernels() == 1


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_pictures_that_rows_wait_for(debug_config: MMInterleavedConfig, processor, kind: str) -> None:
    """Read as one recorded block against `append_images`, in two of three rows, twice."""
    model = other_model(debug_config, kind)
    pixels = torch.rand(2, 3, *[model.config.vision_config.image_size] * 2)
    contexts = []
    for read in (read_images, Context.append_images):
        context = model.read(prompts(processor))
        for rows in ([0, 2], [1, 2]):
            soi = torch.full((3, 1), model.config.soi_token_id)
            mask = torch.tensor([[int(i in rows)] for i in range(3)])
            context.append(soi, mask)
            read(context, rows, pixels)
        contexts.append(context)
    a, b = contexts
    assert torch.equal(a.mask, b.mask)
    assert a.row_images == b.row_images
    assert torch.equal(a.visible, b.visible)
    assert (a.tokens_read, a.images_read) == (b.tokens_read, b.images_read)
    real = a.mask == 1
    torch.testing.assert_close(torch.cat(a.hidden, 1)[real], torch.cat(b.hidden, 1)[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.last, b.last, rtol=1e-5, atol=1e-5)
    settings = replace(GREEDY, max_new_tokens=6, cache_implementation="static")
    found, expected = (list(write(c, settings, [torch.Generator()] * 3)) for c in contexts)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x.tokens, y.tokens)
