"""Generation states and leased workspaces under all that callers do: stopping, threads, growth, types of numbers."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from mm_interleaved import Batch, Document, Image, MMInterleaved, MMInterleavedProcessor, Text, TextSettings
from mm_interleaved.generation import state as state_module
from mm_interleaved.generation import workspace
from mm_interleaved.generation.state import GenerationState
from mm_interleaved.generation.text import score_options, write, write_beams, write_greedy
from mm_interleaved.generation.workspace import POOL, Workspace, WorkspacePool
from mm_interleaved.model.static import Pool

from ..conftest import make_image
from .test_text import prompts

GREEDY = TextSettings(max_new_tokens=5, min_new_tokens=5, num_beams=1)
BEAMS = TextSettings(max_new_tokens=4, min_new_tokens=4, num_beams=2, num_return_sequences=2)


@pytest.fixture(autouse=True)
def _empty_pool() -> Iterator[None]:
    POOL.clear()
    yield
    POOL.clear()


@pytest.fixture
def batch(processor: MMInterleavedProcessor) -> Batch:
    return prompts(processor)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a captured step is the call itself."""
    monkeypatch.setattr(workspace, "capture", lambda step, device: step)


def texts(model: MMInterleaved, batch: Batch, settings: TextSettings = GREEDY) -> list[list[list[int]]]:
    return [[text.ids for text in row] for row in model.generate_text(batch, settings)]


def kept(model: MMInterleaved) -> list[Workspace]:
    return POOL._idle.get(model, [])


# ---- one call after another


def test_inference_mode_and_no_grad_in_turn(model: MMInterleaved, batch: Batch) -> None:
    """What a call in inference mode leaves in the pool can be written by the next one."""
    with torch.inference_mode():
        first = texts(model, batch)
    with torch.no_grad():
        assert texts(model, batch) == first
    with torch.inference_mode():
        assert texts(model, batch) == first
    assert texts(model, batch) == first


def test_what_was_left_by_autocast_is_not_used_without(model: MMInterleaved, batch: Batch) -> None:
    expected = model.prefill(batch).next_logits().clone()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.prefill(batch).next_logits().clone()
        texts(model, batch)
        texts(model, batch, BEAMS)
    torch.testing.assert_close(rounded, expected, rtol=0.1, atol=0.3)
    assert not torch.allclose(rounded, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.prefill(batch).next_logits(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_that_has_read_nothing_knows_nothing_of_the_last_session(model: MMInterleaved, batch: Batch) -> None:
    before = model.prefill(batch)
    capacity = before.workspace.capacity
    assert before.last.any()
    del before
    fresh = GenerationState(model, 3, tokens=capacity.columns - 1, slots=capacity.slots, images=capacity.images)
    assert not fresh.last.any()


def test_nan_of_one_session_does_not_reach_the_next(model: MMInterleaved, batch: Batch, captured: None) -> None:
    for graphs in (False, True):
        found = []
        for factor in (1.0, float("nan"), 1.0):
            state = GenerationState(model, 3, graphs, tokens=40, slots=2, images=3)
            state.prefill(batch["input_ids"], batch["attention_mask"], batch["pixel_values"] * factor)
            found.append(state.decode_step(torch.tensor([7, 8, 9]), torch.ones(3, dtype=torch.bool)).clone())
            del state
        assert found[1].isnan().any()
        assert torch.equal(found[0], found[2])


def test_twenty_sessions_use_one_workspace(model: MMInterleaved, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Watched(Workspace):
        def __init__(self, *args: object) -> None:
            made.append(1)
            super().__init__(*args)

    texts(model, batch)
    monkeypatch.setattr(workspace, "Workspace", Watched)
    for _ in range(20):
        texts(model, batch)
    assert not made
    assert len(kept(model)) <= POOL.size


def test_memory_is_free_without_the_garbage_collector(model: MMInterleaved, batch: Batch) -> None:
    """Otherwise a pool that is cleared because memory is short would free nothing."""
    gc.collect()
    gc.disable()
    try:
        state = model.prefill(batch)
        found = [weakref.ref(x) for x in (state, state.workspace, state.workspace.cache)]
        del state
        POOL.clear()
        assert [x() for x in found] == [None] * 3
    finally:
        gc.enable()


def test_a_workspace_may_come_back_while_another_is_leased(model: MMInterleaved) -> None:
    """The garbage collector runs in whichever thread, at any time: while the pool's lock is held as well."""
    pool, state = WorkspacePool(3), GenerationState(model, 1)
    done = threading.Event()

    def give_back_inside() -> None:
        with pool._lock:
            pool.give_back(weakref.ref(model), state.workspace)
        done.set()

    threading.Thread(target=give_back_inside, daemon=True).start()
    assert done.wait(10)


def test_the_pool_keeps_no_model_alive(model: MMInterleaved, batch: Batch) -> None:
    mine = copy.deepcopy(model)
    state = mine.prefill(batch)
    gone = weakref.ref(mine)
    del mine
    state.reserve_steps(2)
    state.decode_step(torch.tensor([7, 8, 9]), torch.ones(3, dtype=torch.bool))  # a state keeps its model
    del state
    gc.collect()
    assert gone() is None


def test_copies_and_moves_while_a_state_lives(model: MMInterleaved, batch: Batch) -> None:
    mine, expected = copy.deepcopy(model), texts(model, batch)
    state = mine.prefill(batch)
    reference = copy.deepcopy(mine)
    assert texts(reference, batch) == expected
    mine.to(torch.float64)
    assert texts(mine, batch) == expected  # nothing of the state's workspace
    del state
    assert texts(mine, batch) == expected
    assert texts(mine.to(torch.float32), batch) == expected


def test_what_was_generated_is_not_pickled(model: MMInterleaved, batch: Batch) -> None:
    mine = copy.deepcopy(model)
    before = pickle.dumps(mine)
    found = texts(mine, batch)
    after = pickle.dumps(mine)
    assert len(after) == len(before)
    assert texts(pickle.loads(after), batch) == found


# ---- stopping and threads


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_an_error_of_whoever_listens(
    model: MMInterleaved, batch: Batch, captured: None, graphs: bool, taken: int
) -> None:
    """The state goes on from what was shown."""

    def listen(state: GenerationState) -> None:
        for number, _ in enumerate(write(state, GREEDY, [torch.Generator()] * 3)):
            if number == taken:
                raise KeyError("listener")

    state = GenerationState(model, 3, graphs)
    state.prefill(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    start, whole = list(state.lengths), write_greedy(state.branch(range(3)), GREEDY, [torch.Generator()] * 3)
    with pytest.raises(KeyError, match="listener"):
        listen(state)
    assert state.lengths == [n + taken for n in start]
    assert state.workspace.cache.device_lengths.tolist() == state.lengths
    rest = write_greedy(state, GREEDY, [torch.Generator()] * 3)
    assert [row[0].ids[taken:] for row in whole] == [row[0].ids[: 5 - taken] for row in rest]


def test_an_error_inside_a_step(model: MMInterleaved, batch: Batch) -> None:
    """Decode steps that failed were not read; the next call finds everything in order."""
    mine, expected = copy.deepcopy(model), texts(model, batch)
    state = mine.prefill(batch)
    start, logits = list(state.lengths), state.next_logits().clone()
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("hook")

    handle = mine.language_model.layers[-1].mlp.register_forward_hook(fail)
    with pytest.raises(KeyError, match="hook"):
        list(write(state, GREEDY, [torch.Generator()] * 3))
    handle.remove()
    assert state.lengths == [n + 1 for n in start]
    for row, length in enumerate(start):
        state.truncate(row, length)
    torch.testing.assert_close(state.next_logits(), logits)
    del state
    assert texts(mine, batch) == expected


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("where", ["visual_tokenizer", "language_model.layers.2"])
def test_reading_that_failed_was_not_read(
    model: MMInterleaved, batch: Batch, captured: None, graphs: bool, where: str
) -> None:
    """All rows go on as if nobody had tried."""
    mine = copy.deepcopy(model)
    state = GenerationState(mine, 3, graphs)
    state.prefill(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    soi = torch.full((1, 1), mine.config.soi_token_id)
    state.prefill(soi, torch.ones_like(soi), rows=[0])

    def known() -> list[object]:
        hidden = [state.hidden(row).clone() for row in range(3)]
        kept = [image is None for image in state.pyramids]
        lengths = [list(state.lengths), state.workspace.cache.device_lengths.tolist()]
        return [lengths, copy.deepcopy(state.visible), copy.deepcopy(state.row_images), kept, hidden]

    def fail(*_: object) -> None:
        raise KeyError("hook")

    before, expected = known(), state.branch(range(3)).next_logits().clone()
    handle = mine.get_submodule(where).register_forward_hook(fail)
    with pytest.raises(KeyError, match="hook"):
        state.append_images([0], batch["pixel_values"][:1])
    with pytest.raises(KeyError, match="hook"):
        state.prefill(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    handle.remove()
    after = known()
    assert after[:4] == before[:4]
    assert all(torch.equal(a, b) for a, b in zip(after[4], before[4], strict=True))
    torch.testing.assert_close(state.next_logits(), expected)
    state.append_images([0], batch["pixel_values"][:1])
    assert state.visible[0] == [3, 0]


def test_states_of_two_threads(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    batches = [processor(Document([Image(make_image(i)), Text(f"a {i}")])) for i in range(2)]
    expected = [texts(model, b) for b in batches]
    found: dict[int, list] = {}

    def work(index: int) -> None:
        found[index] = [texts(model, batches[index]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [x] * 4 for i, x in enumerate(expected)}


def test_a_lease_may_end_while_another_begins() -> None:
    """As above, for captured steps of the image side: nothing is lent twice, and nobody waits for himself."""
    owner, pool, done = torch.nn.Linear(1, 1), Pool(4), threading.Event()

    def work() -> None:
        first = pool.borrow(owner, "a", (), list)
        kept = first.__enter__()
        with pool._lock:
            first.__exit__(None, None, None)
        with pool.borrow(owner, "a", (), list) as again, pool.borrow(owner, "a", (), list) as other:
            assert again is kept
            assert other is not kept
        done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(10)


# ---- growth


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("columns", [1, 3])
def test_growth_in_the_middle_of_a_session(
    model: MMInterleaved, batch: Batch, captured: None, monkeypatch: pytest.MonkeyPatch, graphs: bool, columns: int
) -> None:
    """Every few tokens there is no more room, and every new image needs a place."""
    found = []
    for unit in (1024, columns):
        POOL.clear()
        monkeypatch.setattr(workspace, "COLUMNS", {"cpu": unit})
        monkeypatch.setattr(workspace, "FEWEST_COLUMNS", 1)
        leases = []
        monkeypatch.setattr(state_module.GenerationState, "_lease", _counted(GenerationState._lease, leases))
        state = GenerationState(model, 3, graphs)
        state.prefill(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
        soi = torch.full((1, 1), model.config.soi_token_id)
        for turn in range(2):
            write_greedy(state, GREEDY, [torch.Generator()] * 3)
            state.prefill(soi, torch.ones_like(soi), rows=[turn])
            state.append_images([turn], batch["pixel_values"][turn : turn + 1])
        state.reserve_steps(200)  # what comes next is known already, and must not be lost
        found.append((state.lengths, state.next_logits().clone(), [state.hidden(r).clone() for r in range(3)]))
        if unit == columns:
            assert len(leases) >= 4
        del state
    (lengths, logits, hidden), (others, other_logits, other_hidden) = found
    assert lengths == others
    torch.testing.assert_close(other_logits, logits, rtol=1e-4, atol=1e-4)
    for a, b in zip(hidden, other_hidden, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def _counted(function: Callable, calls: list) -> Callable:
    return lambda *args: calls.append(1) or function(*args)


# ---- small batches, and the end of the context


def test_a_row_without_tokens_leaves_the_others_alone(model: MMInterleaved, batch: Batch) -> None:
    expected, mask = texts(model, batch), batch["attention_mask"].clone()
    mask[1] = 0  # the row without images
    for settings, wanted in ((GREEDY, expected), (BEAMS, texts(model, batch, BEAMS))):
        found = texts(model, Batch(**{**batch, "attention_mask": mask}), settings)
        assert [found[0], found[2]] == [wanted[0], wanted[2]]
        assert len(found[1][0]) == settings.max_new_tokens


def test_a_single_row_without_images(model: MMInterleaved, processor: MMInterleavedProcessor, batch: Batch) -> None:
    for settings in (GREEDY, BEAMS):
        assert texts(model, processor(Document([Text("hello")])), settings)[0] == texts(model, batch, settings)[1]


def test_images_that_are_missing_are_refused(model: MMInterleaved, batch: Batch) -> None:
    with pytest.raises(ValueError, match="holds 12 image tokens, but 0 images need 0"):
        model.generate_text(Batch(**{**batch, "pixel_values": None}))


def long_prompt(model: MMInterleaved, left: int) -> Batch:
    """A row of words with room for `left` more tokens, and a short one."""
    length = model.context_length - left
    ids = torch.stack([7 + torch.arange(length) % 50] * 2)
    ids[:, 0] = model.config.bos_token_id
    mask = torch.ones_like(ids)
    mask[1, :-3] = 0
    return Batch(input_ids=ids, attention_mask=mask, pixel_values=None)


@pytest.mark.parametrize("left", [0, 1, 3])
@pytest.mark.parametrize("settings", [GREEDY, BEAMS, TextSettings(5, 5, 1, do_sample=True, num_return_sequences=2)])
def test_text_ends_with_the_context_and_says_so(model: MMInterleaved, left: int, settings: TextSettings) -> None:
    batch, most = long_prompt(model, left), settings.max_new_tokens
    rows = model.generate_text(batch, settings)
    assert [len(row) for row in rows] == [settings.num_return_sequences] * 2
    assert [len(t.ids) for t in rows[0]] == [left] * len(rows[0])
    assert [len(t.ids) for t in rows[1]] == [most] * len(rows[1])
    assert all(t.at_context_end for t in rows[0])
    assert not any(t.at_context_end for t in rows[1])
    short = Batch(input_ids=batch["input_ids"][1:, -3:], attention_mask=batch["attention_mask"][1:, -3:],
                  pixel_values=None)  # fmt: skip
    assert [t.ids for t in rows[1]] == texts(model, short, settings)[0]


def test_a_prompt_longer_than_the_context_is_refused(model: MMInterleaved) -> None:
    with pytest.raises(ValueError, match="513 tokens are more than the 512 of the model's context"):
        model.generate_text(long_prompt(model, -1), GREEDY)
    state = model.prefill(long_prompt(model, 1))
    with pytest.raises(ValueError, match="513 tokens are more than the 512"):
        score_options(state, [[[7], [8, 9]], []])
    with pytest.raises(ValueError, match="more than the 512 of the model's context"):
        state.append_images([0], torch.zeros(1, 3, 32, 32))
    assert state.visible == [[], []]
    assert len(score_options(state, [[[7]], [[7, 8]]])[0]) == 1


def test_a_limit_without_measure_takes_no_more_memory_than_the_context(model: MMInterleaved) -> None:
    batch = long_prompt(model, 2)
    state = model.prefill(batch, max_new_tokens=10**9)
    assert state.workspace.capacity.columns <= model.context_length + 64
    assert write_beams(state, TextSettings(10**9, 0, 2), limits=[2, 2])
    branch = state.branch([0, 1], tokens=10**9)
    assert branch.workspace.capacity.columns <= model.context_length + 64


# ---- modes and types


def test_training_mode_and_checkpointing_change_nothing(model: MMInterleaved, batch: Batch) -> None:
    """Without gradients there is nothing to compute anew, so that the KV cache stays."""
    expected, mine = texts(model, batch), copy.deepcopy(model).train()
    assert texts(mine, batch) == expected
    mine.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in mine.language_model.layers)
    assert texts(mine, batch) == expected
    assert texts(mine, batch, BEAMS) == texts(model, batch, BEAMS)
    assert mine.training


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str
)
def test_other_types_of_the_whole_model(model: MMInterleaved, batch: Batch, dtype: torch.dtype, bound: float) -> None:
    mine, expected = copy.deepcopy(model).to(dtype), model.prefill(batch).next_logits()
    found = mine.prefill(batch).next_logits()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float((found - expected).abs().max() / expected.abs().max()) < bound
    assert [[len(t) for t in row] for row in texts(mine, batch, BEAMS)] == [[4, 4]] * 3
    assert [[len(t) for t in row] for row in texts(mine, batch)] == [[5]] * 3
