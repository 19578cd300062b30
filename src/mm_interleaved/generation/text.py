"""Generating text: greedy search, sampling, beam search, and scores of given texts, over a `GenerationState`.

Tokens are chosen on the device. With CUDA graphs a few steps are launched before the host reads the result of the
first. Steps after the end of all rows have no effect.

Axes: R rows, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from ..model.kv_cache import send
from ..ops import promote
from .rules import (
    Hypotheses,
    TextStep,
    WrittenText,
    beam_candidates,
    choose_token,
    end_tokens,
    rows_to_write,
    score_processors,
    uniform,
)
from .settings import TextSettings
from .state import GenerationState

T = TypeVar("T")
STEPS_AHEAD = 3  # decode steps launched ahead with CUDA graphs; without graphs more than one has no advantage


class _Message:
    """Numbers that are copied from the device to the host asynchronously; `read` waits for them."""

    def __init__(self, numbers: Tensor) -> None:
        cuda = numbers.device.type == "cuda"
        self._numbers = numbers.to("cpu", non_blocking=cuda)
        self._sent = None
        if cuda:
            self._sent = torch.cuda.current_stream(numbers.device).record_event()

    def read(self) -> Tensor:
        """The numbers."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._numbers


@dataclass
class _Step:
    """One launched step: its message to the host, its logits, and the state of the generators before it."""

    message: _Message  # [3, R] tokens; rows that got one; rows whose previous token was processed
    logits: Tensor
    before: list[Tensor]


def text_limits(state: GenerationState, settings: TextSettings) -> list[int]:
    """The most new tokens of each row: `max_new_tokens`, or the rest of the context."""
    return [max(min(settings.max_new_tokens, state.model.context_length - n), 0) for n in state.lengths]


def _within_context(state: GenerationState, settings: TextSettings, limits: Sequence[int] | None) -> list[int]:
    """`limits` of each row, cut to the rest of the context; None: `text_limits`."""
    own = text_limits(state, settings)
    return own if limits is None else [min(a, b) for a, b in zip(own, limits, strict=True)]


@torch.no_grad()
def write(
    state: GenerationState,
    settings: TextSettings,
    generators: Sequence[torch.Generator],
    active: Tensor | None = None,
    limits: Sequence[int] | None = None,
    banned: Sequence[int] = (),
) -> Iterator[TextStep]:
    """Generate text by greedy search or sampling, one token for every active row at a time.

    A token is processed when its row continues after it. So afterwards the state has processed every token but the last
    of each row: an end token, or the last token before its limit. If the caller stops early, it has processed all but
    the last tokens that were yielded.

    Args:
        state: the rows, which are extended.
        settings: settings with num_beams 1.
        generators: one for each row, used for sampling.
        active: [R] bool, the rows to generate in; None: all.
        limits: most tokens for each row; None: `text_limits`. A row never exceeds the context.
        banned: tokens that are never chosen.
    """
    model, device = state.model, state.device
    limits = _within_context(state, settings, limits)
    processors = score_processors(model, settings, device, banned)
    ends = torch.tensor(end_tokens(model), device=device)
    history, active, most_of = rows_to_write(model, state.rows, device, active, limits)
    most = max((n for n, on in zip(limits, active.tolist(), strict=True) if on), default=0)
    if most == 0:
        return
    state.reserve_steps(most)
    ahead = STEPS_AHEAD if state.graphs else 1
    under_way: deque[_Step] = deque()
    counts, start = [0] * state.rows, list(state.lengths)
    tokens, reading = history[:, 0], torch.zeros_like(active)
    try:
        while True:
            while len(under_way) < ahead and history.shape[1] <= most and (state.graphs or bool(active.any())):
                before = [g.get_state() for g in generators] if settings.do_sample else []
                logits = state.next_logits() if history.shape[1] == 1 else state.decode_step(tokens, reading)
                logits = logits.clone()  # the next step overwrites them
                scores = processors(history, logits)
                numbers = send(uniform(generators), device) if settings.do_sample else None
                tokens = scores.argmax(-1) if numbers is None else choose_token(scores, numbers)
                tokens = torch.where(active, tokens, model.config.pad_token_id)
                history = torch.cat([history, tokens[:, None]], dim=1)
                message = _Message(torch.stack([tokens, active.long(), reading.long()]))
                under_way.append(_Step(message, logits, before))
                active = reading = active & (tokens[:, None] != ends).all(-1) & (history.shape[1] - 1 < most_of)
            if not under_way:
                return
            chosen, got, had_read = under_way[0].message.read()
            if not got.any():
                return
            counts = [n + int(r) for n, r in zip(counts, had_read.tolist(), strict=True)]
            yield TextStep(chosen, got.bool(), under_way.popleft().logits)
    finally:
        for generator, past in zip(generators, under_way[0].before if under_way else (), strict=False):
            generator.set_state(past)  # as if the steps after the end had not been launched
        state.settle([a + b for a, b in zip(start, counts, strict=True)])


def write_greedy(
    state: GenerationState,
    settings: TextSettings,
    generators: Sequence[torch.Generator],
    banned: Sequence[int] = (),
) -> list[list[WrittenText]]:
    """Generate text in every row; for several sequences a row (sampling) in copies of `state`."""
    copies = settings.num_return_sequences
    if copies > 1:
        rows = [r for r in range(state.rows) for _ in range(copies)]
        state = state.branch(rows, tokens=settings.max_new_tokens)
        generators = [g for g in generators for _ in range(copies)]
    texts = [WrittenText([]) for _ in range(state.rows)]
    limits = text_limits(state, settings)
    for step in write(state, settings, generators, banned=banned):
        add_tokens(step, texts, end_tokens(state.model))
    for text, limit in zip(texts, limits, strict=True):
        text.at_context_end = text.end is None and limit < settings.max_new_tokens
    return [texts[i : i + copies] for i in range(0, len(texts), copies)]


def add_tokens(step: TextStep, texts: list[WrittenText], ends: list[int]) -> None:
    """Append the tokens of one step to `texts`, one for each row."""
    for text, token, active in zip(texts, step.tokens.tolist(), step.active.tolist(), strict=True):
        if active and token in ends:
            text.end = token
        elif active:
            text.ids.append(token)


class _Finished:
    """The best finished texts of every row, on the device; see `rules.Hypotheses`.

    Args:
        batch, size: number of rows, and of texts kept for each.
        lengths: [steps + 2] float64, the divisor of scores for every length.
    """

    def __init__(self, batch: int, size: int, lengths: Tensor) -> None:
        device = lengths.device
        self.lengths = lengths
        self.scores = torch.full((batch, size), -torch.inf, dtype=torch.float64, device=device)
        self.ends, self.steps, self.parents = (
            torch.full((batch, size), -1, dtype=torch.long, device=device) for _ in range(3)
        )
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)

    def add(self, step: int, scores: Tensor, ends: Tensor, parents: Tensor, finished: Tensor) -> None:
        """Add the candidates [batch, n] of step number `step`, best first, that are `finished`."""
        size = self.scores.shape[1]
        finished = finished & ~self.done[:, None]
        scores = torch.where(finished, scores.double() / self.lengths[step + 1], -torch.inf)
        best = torch.cat([self.scores, scores], dim=1).sort(dim=1, descending=True, stable=True)
        chosen = best.indices[:, :size]  # the sort is stable: of equal scores the earlier one is kept
        self.scores = best.values[:, :size]
        others = [(self.ends, ends), (self.steps, torch.full_like(ends, step)), (self.parents, parents)]
        self.ends, self.steps, self.parents = (torch.cat(x, dim=1).gather(1, chosen) for x in others)

    def check(self, step: int, best_running: Tensor) -> None:
        """Mark rows as done in which no running beam can beat the worst finished text."""
        worst = self.scores[:, -1]
        self.done = self.done | ((worst > -torch.inf) & (worst >= best_running.double() / self.lengths[step + 2]))


def write_beams(
    state: GenerationState, settings: TextSettings, limits: Sequence[int] | None = None, banned: Sequence[int] = ()
) -> list[list[WrittenText]]:
    """The best texts of each row by beam search, best first. `state` does not change.

    Args:
        state: the rows.
        settings, banned: as in `write`.
        limits: most tokens for each row; None: `text_limits`. Rows with the same limit are searched together.
    """
    own = text_limits(state, settings)
    limits = _within_context(state, settings, limits)
    copies = range(settings.num_return_sequences)  # empty texts for rows at the end of their context
    found: list[list[WrittenText]] = [[WrittenText([]) for _ in copies] for _ in range(state.rows)]
    for limit in sorted(set(limits) - {0}):
        rows = [r for r in range(state.rows) if limits[r] == limit]
        texts = _last(search(state, rows, replace(settings, max_new_tokens=limit), banned))
        for row, best in zip(rows, texts, strict=True):
            found[row] = best
    for row, limit in enumerate(limits):
        for text in found[row]:
            text.at_context_end = text.end is None and limit == own[row] < settings.max_new_tokens
    return found


def _last(steps: Generator[None, None, T]) -> T:
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            return ended.value


@torch.no_grad()
def search(
    state: GenerationState, rows: Sequence[int], settings: TextSettings, banned: Sequence[int]
) -> Generator[None, None, list[list[WrittenText]]]:
    """Beam search in some rows: yields after every step, and returns the best texts of each, best first.

    Beams share common columns and are reordered by index. `state` does not change, and may change meanwhile.
    """
    model, device, width, most = state.model, state.device, settings.num_beams, settings.max_new_tokens
    batch, pad, count = len(rows), model.config.pad_token_id, beam_candidates(model, settings.num_beams)
    processors = score_processors(model, settings, device, banned)
    ends = torch.tensor(end_tokens(model), device=device)
    history = torch.full((batch * width, 1), model.config.bos_token_id, device=device)
    first = torch.arange(batch, device=device)[:, None] * width
    lengths = torch.tensor([max(n, 1) ** settings.length_penalty for n in range(most + 3)], dtype=torch.float64)
    finished = _Finished(batch, width, lengths.to(device))
    trace: list[tuple[Tensor, Tensor]] = []  # parents and tokens of every step
    under_way: deque[_Message] = deque()  # for every step whether all rows are done after it
    beams = state.branch(rows, width, tokens=most)
    logits = beams.next_logits()
    everyone = torch.ones(batch * width, dtype=torch.bool, device=device)
    ahead = STEPS_AHEAD if state.graphs else 1
    scores = torch.full((batch, width), -1e9, device=device, dtype=logits.dtype)
    scores[:, 0] = 0
    for step in range(most):
        ranked = processors(cast("torch.LongTensor", history), logits.log_softmax(-1)) + scores.view(-1)[:, None]
        vocab = ranked.shape[-1]
        best, index = ranked.view(batch, -1).topk(count, dim=1)
        parents, tokens = first + index // vocab, index % vocab
        ending = torch.isin(tokens, ends)
        finished.add(step, best[:, :width], tokens[:, :width], parents[:, :width], ending[:, :width])
        running = ending.int().argsort(dim=1, stable=True)[:, :width]
        parents, tokens, scores = (x.gather(1, running) for x in (parents, tokens, best))
        done = finished.done[:, None]
        parents, tokens, scores = (torch.where(done, a, b) for a, b in (
            (first, parents), (pad, tokens), (0.0, scores)))  # fmt: skip
        finished.check(step, best[:, 0])
        parents, tokens = parents.flatten(), tokens.flatten()
        history = torch.cat([history[parents], tokens[:, None]], dim=1)
        trace.append((parents, tokens))
        under_way.append(_Message(finished.done.all()))
        if step + 1 == most or (len(under_way) == ahead and under_way.popleft().read()):
            break
        beams.reorder(parents)
        logits = beams.decode_step(tokens, everyone)
        yield
    return _texts(finished, trace, scores, history, settings)


def _texts(
    finished: _Finished,
    trace: list[tuple[Tensor, Tensor]],
    scores: Tensor,
    history: Tensor,
    settings: TextSettings,
) -> list[list[WrittenText]]:
    """The finished texts of every row, traced back from their ends; running beams count if a row is not done."""
    parents, tokens = (torch.stack(x).tolist() for x in zip(*trace, strict=True))

    def back(step: int, beam: int) -> list[int]:
        ids = []
        for at in range(step - 1, -1, -1):
            ids.append(tokens[at][beam])
            beam = parents[at][beam]
        return ids[::-1]

    columns = (finished.scores, finished.ends, finished.steps, finished.parents, finished.done, scores)
    found = []
    for score, end, step, parent, done, running in zip(*(x.tolist() for x in columns), strict=True):
        row = Hypotheses(settings.num_beams, settings.length_penalty)
        row.finished = [
            WrittenText(back(at, beam), token, value)
            for value, token, at, beam in zip(score, end, step, parent, strict=True) if at >= 0
        ]  # fmt: skip
        if not done:
            for beam, value in enumerate(running, len(found) * settings.num_beams):
                row.add(history[beam].tolist(), None, value)
        found.append(row.finished[: settings.num_return_sequences])
    return found


@torch.no_grad()
def score_options(
    state: GenerationState, options: Sequence[Sequence[Sequence[int]]], batch_size: int = 4
) -> list[list[float]]:
    """Log-probabilities of given continuations, not normalised by length. The prompt is not processed again.

    Args:
        state: rows of prompts, which do not change.
        options: for each row the ids of its options.
        batch_size: number of options processed together.

    Returns:
        For each row the sum of log p over each option's tokens.

    Raises:
        ValueError: an option has no tokens or an id outside the vocabulary, or does not fit into the context.
    """
    size = state.model.config.vocab_size
    for row, row_options in enumerate(options):
        for number, ids in enumerate(row_options):
            if not len(ids):
                raise ValueError(f"option {number} of row {row} has no tokens, and so no probability")
            if outside := [i for i in ids if not 0 <= i < size]:
                raise ValueError(
                    f"option {number} of row {row} has the id {outside[0]}, but the vocabulary has {size} tokens"
                )
    jobs = [(row, ids) for row, row_options in enumerate(options) for ids in row_options]
    steps = score_in_steps(state, jobs, batch_size)
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            totals = iter(torch.stack([scores.sum() for scores in ended.value]).tolist() if jobs else [])
            return [[next(totals) for _ in row_options] for row_options in options]


@torch.no_grad()
def score_in_steps(
    state: GenerationState, texts: Sequence[tuple[int, Sequence[int]]], batch_size: int = 4, columns: int | None = None
) -> Generator[None, None, list[Tensor]]:
    """Log-probabilities of the tokens of texts after rows of `state`, which do not change.

    Yields after each call of the model.

    Args:
        state: rows of prompts.
        texts: for each text its row, and its ids.
        batch_size: number of texts processed together.
        columns: most tokens of a text in one call; None: all.

    Returns:
        For each text log p of its tokens, [L].
    """
    pad, found = state.model.config.pad_token_id, []
    for begin in range(0, len(texts), batch_size):
        part = texts[begin : begin + batch_size]
        longest = max(len(ids) for _, ids in part)
        tokens = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for _, ids in part])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for _, ids in part])
        branch, scores = state.branch([row for row, _ in part], tokens=longest), []
        for piece, own in zip(tokens.split(columns or longest, 1), mask.split(columns or longest, 1), strict=True):
            before = branch.last.clone()
            hidden = branch.prefill(piece, own)
            logits = state.model.compute_logits(torch.cat([before[:, None], hidden[:, :-1]], dim=1))
            log_probabilities = logits.to(promote(logits.dtype)).log_softmax(-1)
            scores.append(log_probabilities.gather(-1, piece.to(logits.device)[..., None])[..., 0])
            yield
        whole = torch.cat(scores, dim=1)
        found += [whole[row, : len(ids)] for row, (_, ids) in enumerate(part)]
    return found
