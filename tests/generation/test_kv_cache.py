"""Texts over the KV cache against a state without one: same tokens, same rows afterwards, for every way to generate."""

from __future__ import annotations

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from mm_interleaved import Batch, MMInterleaved, MMInterleavedConfig, MMInterleavedProcessor, TextSettings
from mm_interleaved.generation import text as text_module
from mm_interleaved.generation import workspace
from mm_interleaved.generation.state import GenerationState
from mm_interleaved.generation.text import score_options, write, write_beams, write_greedy
from mm_interleaved.model import decoder_layer
from mm_interleaved.model.fused import decoding_kernels
from mm_interleaved.model.language_model import synchronizers
from mm_interleaved.ops.mmfs_attention import HAS_TRITON

from ..conftest import awaken
from .reference import ReferenceState, reference_beams
from .test_text import prompts

BANNED = 2049  # the image token, for which the reference would need an image
GREEDY = TextSettings(max_new_tokens=8, min_new_tokens=2, num_beams=1, repetition_penalty=1.3)
KINDS = {
    "greedy": GREEDY,
    "sampling": replace(GREEDY, do_sample=True, temperature=1.4, top_p=0.95),
    "beams": TextSettings(max_new_tokens=6, num_beams=3, num_return_sequences=2),
    "beams that may end at once": TextSettings(max_new_tokens=8, min_new_tokens=0, num_beams=4, length_penalty=0.0,
                                               repetition_penalty=1.2),
}  # fmt: skip


@pytest.fixture(params=[False, True], ids=["called", "captured"])
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether steps are captured. On a CPU a captured step is the call itself, over the same memory."""
    if request.param:
        monkeypatch.setattr(workspace, "capture", lambda step, device: step)
    return request.param


@pytest.fixture(scope="module")
def ending(model: MMInterleaved) -> MMInterleaved:
    """A model that likes to end its texts."""
    eager = copy.deepcopy(model)
    with torch.no_grad():
        eager.lm_head.head.bias[model.config.eos_token_id] += 6
        eager.lm_head.new.bias += 10
    return eager


def read(model: MMInterleaved, batch: Batch, graphs: bool = False) -> GenerationState:
    """The state after a batch."""
    state = GenerationState(model, len(batch["input_ids"]), graphs)
    state.prefill(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    return state


def steps(state: GenerationState | ReferenceState, chosen: TextSettings, limits: list[int]) -> tuple[list, list]:
    """The steps of a text, and the generators afterwards."""
    generators = [torch.Generator().manual_seed(i) for i in range(state.rows)]
    assert state.model.config.image_token_id == BANNED
    return list(write(state, chosen, generators, limits=limits, banned=[BANNED])), generators


@pytest.mark.parametrize("kind", ["greedy", "sampling"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_and_rows_afterwards(
    model: MMInterleaved, ending: MMInterleaved, processor, graphs: bool, kind: str, side: str
) -> None:
    """Tokens, logits, generators, hidden states: ragged rows with no, one and two images, some end early."""
    batch, limits = prompts(processor, side), [3, 8, 5]
    for m in (model, ending):
        state, reference = read(m, batch, graphs), ReferenceState.of(m, batch)
        (found, ours), (expected, theirs) = (steps(s, KINDS[kind], limits) for s in (state, reference))
        assert len(found) == len(expected)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x.tokens, y.tokens)
            assert torch.equal(x.active, y.active)
            torch.testing.assert_close(x.logits[x.active], y.logits[x.active], rtol=1e-4, atol=1e-4)
        assert all(torch.equal(x.get_state(), y.get_state()) for x, y in zip(ours, theirs, strict=True))
        assert state.lengths == reference.lengths
        assert state.workspace.cache.device_lengths.tolist() == reference.lengths
        for row in range(3):
            torch.testing.assert_close(state.hidden(row), reference.hidden(row), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(state.last[row], reference.hidden(row)[-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state.next_logits(), reference.next_logits(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["beams", "beams that may end at once"])
def test_beams(model: MMInterleaved, ending: MMInterleaved, processor, graphs: bool, kind: str) -> None:
    batch = prompts(processor)
    for m in (model, ending):
        state, reference = read(m, batch, graphs), ReferenceState.of(m, batch)
        before = [state.hidden(row).clone() for row in range(3)], state.last.clone()
        found, expected = (
            write_beams(state, KINDS[kind], banned=[BANNED]),
            reference_beams(reference, KINDS[kind], [BANNED]),
        )
        for a, b in zip(found, expected, strict=True):
            assert [(t.ids, t.end) for t in a] == [(t.ids, t.end) for t in b]
            assert [t.score for t in a] == pytest.approx([t.score for t in b], rel=1e-4)
        assert all(torch.equal(state.hidden(row), h) for row, h in enumerate(before[0]))
        assert torch.equal(state.last, before[1])


def test_several_samples_a_row(model: MMInterleaved, processor: MMInterleavedProcessor, graphs: bool) -> None:
    """Copies of a row read on by themselves."""
    batch, found = prompts(processor), []
    chosen = replace(KINDS["sampling"], max_new_tokens=5, num_return_sequences=2)
    for state in (read(model, batch, graphs), ReferenceState.of(model, batch)):
        generators = [torch.Generator().manual_seed(5) for _ in range(3)]
        found.append([[t.ids for t in row] for row in write_greedy(state, chosen, generators, [BANNED])])
    assert found[0] == found[1]
    assert any(row[0] != row[1] for row in found[0])


def test_stopping_in_the_middle(model: MMInterleaved, processor, graphs: bool) -> None:
    """Whoever stops listening finds what was shown in the state, all but the last tokens, and no more."""
    batch = prompts(processor)
    state, reference = read(model, batch, graphs), ReferenceState.of(model, batch)
    running, expected = (write(s, GREEDY, [torch.Generator()] * 3, banned=[BANNED]) for s in (state, reference))
    for _ in range(4):
        shown = next(running)
        assert torch.equal(shown.tokens, next(expected).tokens)
    running.close()
    expected.close()
    assert state.lengths == reference.lengths
    torch.testing.assert_close(state.next_logits(), reference.next_logits(), rtol=1e-4, atol=1e-4)
    again = [list(write(s, GREEDY, [torch.Generator()] * 3, banned=[BANNED])) for s in (state, reference)]
    assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(*again, strict=True))


@pytest.mark.parametrize("ahead", [1, 2, 50])
def test_how_many_steps_are_ahead_does_not_matter(
    ending: MMInterleaved, processor, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    monkeypatch.setattr(workspace, "capture", lambda step, device: step)
    monkeypatch.setattr(text_module, "STEPS_AHEAD", ahead)
    batch = prompts(processor)
    for kind in ("sampling", "beams that may end at once"):
        chosen = KINDS[kind]
        state, reference = read(ending, batch, True), ReferenceState.of(ending, batch)
        if chosen.num_beams > 1:
            found, expected = write_beams(state, chosen, banned=[BANNED]), reference_beams(reference, chosen, [BANNED])
            assert [[t.ids for t in row] for row in found] == [[t.ids for t in row] for row in expected]
        else:
            (found, ours), (expected, theirs) = (steps(s, chosen, [6, 8, 4]) for s in (state, reference))
            assert [x.tokens.tolist() for x in found] == [x.tokens.tolist() for x in expected]
            assert all(torch.equal(x.get_state(), y.get_state()) for x, y in zip(ours, theirs, strict=True))


def test_options(model: MMInterleaved, processor: MMInterleavedProcessor, graphs: bool) -> None:
    batch, options = prompts(processor), [[[5], [6, 7, 8]], [[9, 10]], [[5, 6], [7], [8, 9, 11]]]
    state, reference = read(model, batch, graphs), ReferenceState.of(model, batch)
    found = score_options(state, options, batch_size=4)
    for row, ids_of_row in enumerate(options):
        for number, ids in enumerate(ids_of_row):
            branch = reference.branch([row])
            before = branch.lengths[0]
            branch.ids[0] += ids
            logits = model.compute_logits(branch.hidden(0)[before - 1 : -1]).log_softmax(-1)
            expected = float(logits.gather(-1, torch.tensor(ids)[:, None]).sum())
            assert found[row][number] == pytest.approx(expected, abs=2e-4)


def test_the_next_state_sees_what_was_written(model: MMInterleaved, processor, graphs: bool) -> None:
    """Weights are derived anew for each state, also in a workspace that is used again; `.data` leaves no trace."""
    mine, batch, found, used = copy.deepcopy(model), prompts(processor), [], []
    for factor in (1.0, -0.5):
        for synchronizer in synchronizers(mine.language_model):
            synchronizer.gate.data.mul_(factor)
        state = read(mine, batch, graphs)
        state.decode_step(torch.tensor([20, 21, 22]), torch.ones(3, dtype=torch.bool))
        found.append(state.next_logits().clone())
        reference = ReferenceState.of(mine, batch)
        reference.decode_step(torch.tensor([20, 21, 22]), torch.ones(3, dtype=torch.bool))
        torch.testing.assert_close(found[-1], reference.next_logits(), rtol=1e-4, atol=1e-4)
        used.append(state.workspace)
        del state
    assert used[0] is used[1]
    assert not torch.allclose(*found, atol=1e-2)


def other_model(debug_config: MMInterleavedConfig, kind: str, **changes: object) -> MMInterleaved:
    """A debug model with another decoder of the same sizes."""
    config = copy.deepcopy(debug_config)
    old = config.text_config
    same_sizes = {name: getattr(old, name) for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size", "vocab_size",
        "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")}  # fmt: skip
    config.text_config = AutoConfig.for_model(kind, **same_sizes, num_key_value_heads=1, **changes)
    torch.manual_seed(1)
    return awaken(MMInterleaved(config)).eval()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}), ("mistral", {"sliding_window": None}), ("qwen2", {}), ("qwen3", {}),
        ("mistral", {"sliding_window": 6}), ("llama", {"hidden_act": "gelu"}), ("llama", {"rope_theta": 500.0}),
    ],
    ids=["llama", "mistral", "qwen2", "qwen3", "window", "gelu", "other angles"],
)  # fmt: skip
def test_other_language_models(debug_config, processor, graphs: bool, kind: str, changes: dict) -> None:
    """Fewer key heads than heads; biases (Qwen2), norms of queries and keys (Qwen3), a window, another activation."""
    model, batch = other_model(debug_config, kind, **changes), prompts(processor)
    state, reference = read(model, batch, graphs), ReferenceState.of(model, batch)
    found, expected = (steps(s, GREEDY, [5, 5, 5])[0] for s in (state, reference))
    assert [x.tokens.tolist() for x in found] == [x.tokens.tolist() for x in expected]
    beams = replace(KINDS["beams"], max_new_tokens=4)
    found, expected = (
        write_beams(read(model, batch, graphs), beams, banned=[BANNED]),
        reference_beams(ReferenceState.of(model, batch), beams, [BANNED]),
    )
    assert [[t.ids for t in row] for row in found] == [[t.ids for t in row] for row in expected]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="for Triton's interpreter")
@pytest.mark.parametrize("kind", ["greedy", "beams"])
def test_through_kernels(model: MMInterleaved, processor, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A single row runs all kernels, several run that of attention; both in Triton's interpreter."""
    calls = []
    original = decoder_layer.attend
    monkeypatch.setattr(decoder_layer, "attend", lambda *a, **k: calls.append(1) or original(*a, **k))
    chosen = replace(KINDS[kind], max_new_tokens=3, min_new_tokens=3)
    for rows in (slice(0, 1), slice(0, 3)):
        batch = prompts(processor)
        count = int((batch["image_rows"] < rows.stop).sum())
        part = Batch(**{**batch, "input_ids": batch["input_ids"][rows], "attention_mask": batch["attention_mask"][rows],
                        "position_ids": batch["position_ids"][rows], "pixel_values": batch["pixel_values"][:count],
                        "image_rows": batch["image_rows"][:count],
                        "document_starts": batch["document_starts"][:count]})  # fmt: skip
        with decoding_kernels("always"):
            found = model.generate_text(part, chosen)
        with decoding_kernels("never"):
            expected = model.generate_text(part, chosen)
        assert [[t.ids for t in row] for row in found] == [[t.ids for t in row] for row in expected]
    assert calls


# ---- any order of operations

ROWS = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("text"), ROWS, st.integers(1, 4)),
        st.tuples(st.just("step"), st.lists(st.booleans(), min_size=3, max_size=3), st.integers(5, 60)),
        st.tuples(st.just("image"), ROWS, st.integers(0, 9)),
        st.tuples(st.just("cut"), st.integers(0, 2), st.integers(1, 3)),
        st.tuples(st.just("whole"), ROWS, st.integers(0, 9)),
        st.tuples(st.just("again"), st.integers(0, 2), st.integers(0, 1)),
        st.tuples(st.just("evict"), st.integers(0, 2), st.integers(0, 1)),
        st.tuples(st.just("branch"), st.permutations([0, 1, 2]), st.integers(0, 1)),
    ),
    max_size=7,
)  # fmt: skip


@given(OPERATIONS, st.booleans())
@settings(max_examples=25)
def test_rows_are_independent_in_any_order(model: MMInterleaved, operations: list[tuple], captured: bool) -> None:
    """Text, decode steps, images, cuts, new documents and branches, in some rows at a time, as if each were alone."""
    config = model.config
    reference = ReferenceState(model, [[config.bos_token_id, 7 + r] for r in range(3)], [[], [], []])
    with mock.patch.object(workspace, "capture", lambda step, device: step):
        state = GenerationState(model, 3, captured)
        state.prefill(torch.tensor(reference.ids), torch.ones(3, 2, dtype=torch.long))  # `<s>` is no plain token
        apply = _Apply(state, reference)
        for name, chosen, number in operations:
            getattr(apply, name)(chosen, number)
    state, reference = apply.state, apply.reference
    assert state.lengths == reference.lengths
    for row in range(3):
        torch.testing.assert_close(state.hidden(row), reference.hidden(row), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(state.next_logits(), reference.next_logits(), rtol=1e-4, atol=2e-4)


def test_images_of_several_rows_at_once(model: MMInterleaved, graphs: bool) -> None:
    """Each row gets its own image, in whatever order the rows are named."""
    ids = [[model.config.bos_token_id, 7 + row] for row in range(3)]
    state, reference = GenerationState(model, 3, graphs), ReferenceState(model, ids, [[], [], []])
    state.prefill(torch.tensor(ids), torch.ones(3, 2, dtype=torch.long))
    apply = _Apply(state, reference)
    apply.image([2, 0], 3)
    apply.image([0, 1, 2], 5)
    for row in range(3):
        torch.testing.assert_close(state.hidden(row), reference.hidden(row), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(state.next_logits(), reference.next_logits(), rtol=1e-4, atol=2e-4)


class _Apply:
    """The same operations on a state and on its reference."""

    def __init__(self, state: GenerationState, reference: ReferenceState) -> None:
        self.state, self.reference = state, reference
        self.model = state.model

    def image_of(self, seed: int) -> torch.Tensor:
        side = self.model.config.vision_config.image_size
        return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))

    def text(self, rows: list[int], count: int) -> None:
        ids = torch.arange(10, 10 + count).repeat(len(rows), 1) + torch.tensor(rows)[:, None]
        mask = torch.ones_like(ids)
        if len(rows) > 1:
            mask[0, 0] = 0  # one row gets a token less
        self.state.prefill(ids, mask, rows=rows)
        for row, tokens, real in zip(rows, ids, mask, strict=True):
            self.reference.ids[row] += tokens[real == 1].tolist()

    def step(self, reading: list[bool], token: int) -> None:
        self.state.reserve_steps(1)
        before = self.state.lengths
        self.state.decode_step(torch.tensor([token, token + 1, token + 2]), torch.tensor(reading))
        self.state.settle([n + on for n, on in zip(before, reading, strict=True)])
        self.reference.decode_step(torch.tensor([token, token + 1, token + 2]), torch.tensor(reading))

    def image(self, rows: list[int], seed: int) -> None:
        """An image that the rows wait for."""
        config = self.model.config
        self.state.prefill(torch.full((len(rows), 1), config.soi_token_id), torch.ones(len(rows), 1, dtype=torch.long),
                           rows=rows)  # fmt: skip
        pixels = torch.stack([self.image_of(seed + row) for row in rows])
        self.state.append_images(rows, pixels)
        for row, one in zip(rows, pixels, strict=True):
            self.reference.ids[row] += [config.soi_token_id, *[config.image_token_id] * config.num_image_tokens]
            self.reference.images[row].append(one)

    def whole(self, rows: list[int], seed: int) -> None:
        """Text with an image in it."""
        config = self.model.config
        ids = [9, config.soi_token_id, *[config.image_token_id] * config.num_image_tokens, 11]
        pixels = torch.stack([self.image_of(100 + seed + row) for row in rows])
        tokens = torch.tensor([ids] * len(rows))
        self.state.prefill(tokens, torch.ones_like(tokens), pixels, rows)
        for row, one in zip(rows, pixels, strict=True):
            self.reference.ids[row] += ids
            self.reference.images[row].append(one)

    def cut(self, row: int, count: int) -> None:
        """Text that is taken back."""
        self.text([row], count)
        length = self.state.lengths[row] - count
        self.state.truncate(row, length)
        self.reference.ids[row] = self.reference.ids[row][:length]

    def again(self, row: int, _: int) -> None:
        """A new document in the same row, which sees no image of the one before."""
        ids = [self.model.config.bos_token_id, 30]
        self.state.prefill(torch.tensor([ids]), torch.ones(1, 2, dtype=torch.long), rows=[row])
        self.reference.ids[row] += ids

    def evict(self, row: int, _: int) -> None:
        """A row that leaves, and another document that joins in its place."""
        ids = [self.model.config.bos_token_id, 40, 41]
        self.state.evict(row)
        self.state.prefill(torch.tensor([ids]), torch.ones(1, 3, dtype=torch.long), rows=[row])
        self.reference.ids[row], self.reference.images[row] = list(ids), []

    def branch(self, rows: list[int], _: int) -> None:
        self.state, self.reference = self.state.branch(list(rows)), self.reference.branch(list(rows))
