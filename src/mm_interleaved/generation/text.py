"""Writing text: greedy, sampling and beam search over a `Context`, by the rules of `rules.py`.

`write` and `write_beams` choose by `TextSettings.cache_implementation`: the loops here, whose caches grow with every
token and which wait for the device at each, or those of `static_text.py`, for which these are the plain twins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..ops import promote
from .context import Context
from .rules import (
    Hypotheses,
    TextStep,
    WrittenText,
    beam_candidates,
    draw,
    end_tokens,
    rows_to_write,
    score_processors,
    uniform,
)
from .settings import TextSettings
from .static import uses_static
from .static_text import write_beams_static, write_static


def _logits(context: Context) -> Tensor:
    """What comes next in every row: [batch, vocab]."""
    context.flush()
    logits = context.model.lm_head(context.last)
    return logits.to(promote(logits.dtype))


def write(
    context: Context,
    settings: TextSettings,
    generators: Sequence[torch.Generator],
    active: Tensor | None = None,
    limits: Tensor | None = None,
    banned: Sequence[int] = (),
) -> Iterator[TextStep]:
    """Write by greedy search or sampling, a token for every active row at a time.

    Afterwards every token written belongs to the context, except the ones that closed a row. Until then it may lag
    behind: with a static cache, `context` is as it was before until the writing ends.

    Args:
        context: what has been read; it reads on.
        settings: with num_beams 1.
        generators: one for each row; used when sampling.
        active: [batch] bool, the rows to write in; None: all.
        limits: [batch] most tokens for each row; None: settings.max_new_tokens for all.
        banned: tokens that are never written.

    Raises:
        ValueError: a static cache was asked for, but the model cannot have one.
    """
    kind = write_static if uses_static(context.model, settings.cache_implementation) else write_dynamic
    return kind(context, settings, generators, active, limits, banned)


def write_beams(context: Context, settings: TextSettings, banned: Sequence[int] = ()) -> list[list[WrittenText]]:
    """Beam search in every row of `context`, which is left as it was; the best texts of each row, best first.

    Raises:
        ValueError: a static cache was asked for, but the model cannot have one.
    """
    kind = write_beams_static if uses_static(context.model, settings.cache_implementation) else write_beams_dynamic
    return kind(context, settings, banned)


@torch.no_grad()
def write_dynamic(
    context: Context,
    settings: TextSettings,
    generators: Sequence[torch.Generator],
    active: Tensor | None = None,
    limits: Tensor | None = None,
    banned: Sequence[int] = (),
) -> Iterator[TextStep]:
    """`write` with caches that grow."""
    model, device = context.model, context.mask.device
    processors = score_processors(model, settings, device, banned)
    ends = torch.tensor(end_tokens(model), device=device)
    history, active, limits = rows_to_write(model, settings, context.mask, active, limits)
    while bool(active.any()):
        logits = _logits(context)
        scores = processors(history, logits)
        tokens = draw(scores, uniform(generators).to(device)) if settings.do_sample else scores.argmax(-1)
        tokens = torch.where(active, tokens, model.config.pad_token_id)
        history = torch.cat([history, tokens[:, None]], dim=1)
        yield TextStep(tokens, active, logits)
        read = active & ~torch.isin(tokens, ends)
        if bool(read.any()):
            context.defer(partial(context.append_text, tokens[:, None], read[:, None].long()))
        active = read & (history.shape[1] - 1 < limits)


def write_greedy(
    context: Context, settings: TextSettings, generators: Sequence[torch.Generator]
) -> list[list[WrittenText]]:
    """Write in every row; with several sequences a row (sampling), the rows of `context` are multiplied first."""
    copies = settings.num_return_sequences
    if copies > 1:
        rows = torch.arange(len(context.mask), device=context.mask.device).repeat_interleave(copies)
        context = context.select(rows)
        generators = [g for g in generators for _ in range(copies)]
    texts = [WrittenText([]) for _ in range(len(context.mask))]
    collect(write(context, settings, generators), texts, end_tokens(context.model))
    return [texts[i : i + copies] for i in range(0, len(texts), copies)]


def collect(steps: Iterator[TextStep], texts: list[WrittenText], ends: list[int]) -> None:
    """Run `steps` and put their tokens into `texts`, one for each row."""
    for step in steps:
        add_tokens(step, texts, ends)


def add_tokens(step: TextStep, texts: list[WrittenText], ends: list[int]) -> None:
    """Put the tokens of one step into `texts`."""
    for text, token, active in zip(texts, step.tokens.tolist(), step.active.tolist(), strict=True):
        if active and token in ends:
            text.end = token
        elif active:
            text.ids.append(token)


@torch.no_grad()
def write_beams_dynamic(
    context: Context, settings: TextSettings, banned: Sequence[int] = ()
) -> list[list[WrittenText]]:
    """`write_beams` with caches that grow."""
    model, device, width = context.model, context.mask.device, settings.num_beams
    batch, ends, pad = len(context.mask), end_tokens(model), model.config.pad_token_id
    candidates = beam_candidates(model, width)
    processors = score_processors(model, settings, device, banned)
    start = torch.arange(batch, device=device).repeat_interleave(width)
    beams = context.select(start)
    rows = [Hypotheses(width, settings.length_penalty) for _ in range(batch)]
    history = torch.full((batch * width, 1), model.config.bos_token_id, device=device)
    scores = torch.full((batch, width), -1e9, device=device)
    scores[:, 0] = 0
    scores = scores.view(-1)
    while True:
        log_probabilities = processors(history, _logits(beams).log_softmax(-1)) + scores[:, None]
        vocab = log_probabilities.shape[-1]
        best, index = log_probabilities.view(batch, -1).topk(candidates, dim=1)
        parents, tokens = index // vocab, index % vocab
        plan = [
            _advance(rows[b], b * width, history, best[b].tolist(), parents[b].tolist(), tokens[b].tolist(), ends, pad)
            for b in range(batch)
        ]
        parent = torch.tensor([p for row in plan for p, _, _ in row], device=device)
        token = torch.tensor([t for row in plan for _, t, _ in row], device=device)
        scores = torch.tensor([s for row in plan for _, _, s in row], device=device, dtype=scores.dtype)
        history = torch.cat([history[parent], token[:, None]], dim=1)
        if all(row.done for row in rows) or history.shape[1] > settings.max_new_tokens:
            break
        beams.reorder(parent)
        beams.defer(partial(beams.append_text, token[:, None], torch.ones_like(token[:, None])))
    for b, row in enumerate(rows):
        for i in range(b * width, (b + 1) * width):
            if not row.done:
                row.add(history[i].tolist(), None, float(scores[i]))
    return [row.finished[: settings.num_return_sequences] for row in rows]


def _advance(
    row: Hypotheses,
    first: int,
    history: Tensor,
    best: list[float],
    parents: list[int],
    tokens: list[int],
    ends: list[int],
    pad: int,
) -> list[tuple[int, int, float]]:
    """Sort one row's candidates into finished texts and `num_beams` running beams (parent, token, score)."""
    if row.done:
        return [(first, pad, 0.0)] * row.size
    running = []
    for rank, (score, parent, token) in enumerate(zip(best, parents, tokens, strict=True)):
        if token in ends:
            if rank < row.size:  # an end token ranked lower does not count
                row.add(history[first + parent].tolist(), token, score)
            continue
        running.append((first + parent, token, score))
        if len(running) == row.size:
            break
    row.check(max(best), history.shape[1] + 1)
    return running


@torch.no_grad()
def score_options(
    context: Context, options: Sequence[Sequence[Sequence[int]]], batch_size: int = 4
) -> list[list[float]]:
    """Log-probabilities of given continuations, not normalised by length; the context is read only once.

    Args:
        context: rows of prompts; left as it was.
        options: for each row the ids of its options.
        batch_size: options read at a time.

    Returns:
        For each row the sum of log p over each option's tokens.

    Raises:
        ValueError: an option has no tokens.
    """
    for row, row_options in enumerate(options):
        for number, ids in enumerate(row_options):
            if not len(ids):
                raise ValueError(f"option {number} of row {row} has no tokens, and so no probability")
    device, pad = context.mask.device, context.model.config.pad_token_id
    jobs = [(row, ids) for row, row_options in enumerate(options) for ids in row_options]
    totals: list[float] = []
    for begin in range(0, len(jobs), batch_size):
        part = jobs[begin : begin + batch_size]
        longest = max(len(ids) for _, ids in part)
        tokens = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for _, ids in part], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for _, ids in part], device=device)
        branch = context.select(torch.tensor([row for row, _ in part], device=device))
        before = branch.last
        hidden = branch.append_text(tokens, mask)
        logits = context.model.lm_head(torch.cat([before[:, None], hidden[:, :-1]], dim=1))
        log_probabilities = logits.to(promote(logits.dtype)).log_softmax(-1)
        chosen = log_probabilities.gather(-1, tokens[..., None])[..., 0]
        totals += (chosen * mask).sum(-1).tolist()
    counts = iter(totals)
    return [[next(counts) for _ in row_options] for row_options in options]
