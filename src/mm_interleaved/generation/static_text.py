"""Writing text over a `StaticDecoder`: several tokens are on their way before the host looks at the first.

The loops of `text.py` ask after every token which rows go on; here that is decided on the device, and the host reads
the tokens of several steps at once. Steps that turn out to be too many write into columns that no row has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

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
from .static import Room, borrow

AHEAD = 8  # steps that run before the host reads their tokens


class _Numbers:
    """Random numbers for several steps at a time, and what was not used given back to the generators."""

    def __init__(self, generators: Sequence[torch.Generator], device: torch.device) -> None:
        self.generators, self.device = generators, device
        self.before: list[Tensor] = []

    def ahead(self, steps: int) -> Tensor:
        """[steps, rows] numbers in [0, 1)."""
        self.before = [g.get_state() for g in self.generators]
        return torch.stack([uniform(self.generators) for _ in range(steps)]).to(self.device)

    def used(self, steps: int) -> None:
        """Put the generators where they are after `steps` of the steps drawn last."""
        for generator, state in zip(self.generators, self.before, strict=True):
            generator.set_state(state)
        for _ in range(steps):
            uniform(self.generators)


@torch.no_grad()
def write_static(
    context: Context,
    settings: TextSettings,
    generators: Sequence[torch.Generator],
    active: Tensor | None = None,
    limits: Tensor | None = None,
    banned: Sequence[int] = (),
) -> Iterator[TextStep]:
    """`text.write` with a static cache; the tokens of its steps are on the CPU."""
    context.flush()
    model, device = context.model, context.mask.device
    pad = model.config.pad_token_id
    processors = score_processors(model, settings, device, banned)
    ends = torch.tensor(end_tokens(model), device=device)
    history, active, limits = rows_to_write(model, settings, context.mask, active, limits)
    most = int(torch.where(active, limits, 0).max())
    if most == 0:
        return
    numbers = _Numbers(generators, device)
    with borrow(model, Room.needed(context, 1, most)) as decoder:
        decoder.load(context)
        columns = 0  # that some row has read
        try:
            while history.shape[1] <= most:
                steps = []
                ahead = min(AHEAD, most + 1 - history.shape[1])
                drawn = numbers.ahead(ahead) if settings.do_sample else None
                for step in range(ahead):
                    logits = decoder.logits.clone()
                    scores = processors(history, logits)
                    tokens = scores.argmax(-1) if drawn is None else draw(scores, drawn[step])
                    tokens = torch.where(active, tokens, pad)
                    history = torch.cat([history, tokens[:, None]], dim=1)
                    read = active & ~torch.isin(tokens, ends)
                    decoder.read(tokens, read)
                    steps.append((tokens, active, read, logits))
                    active = read & (history.shape[1] - 1 < limits)
                told = torch.stack([torch.stack(s[:3]) for s in steps]).cpu()  # the host waits here
                shown = 0
                try:
                    for (tokens, wrote, read), (*_, logits) in zip(told, steps, strict=True):
                        if not wrote.any():
                            return
                        shown += 1
                        columns += bool(read.any())
                        yield TextStep(tokens, wrote.bool(), logits)
                finally:
                    if drawn is not None and shown < ahead:
                        numbers.used(shown)
        finally:
            decoder.store(context, columns)


class _Finished:
    """The best finished texts of every row, on the device; see `rules.Hypotheses`.

    Args:
        batch, size: rows, and texts that each keeps.
        lengths: [steps + 2] float64, what a score is divided by for every length.
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
        """Candidates [batch, n] of step number `step`, best first; those count that are `finished`."""
        size = self.scores.shape[1]
        finished = finished & ~self.done[:, None]
        scores = torch.where(finished, scores.double() / self.lengths[step + 1], -torch.inf)
        best = torch.cat([self.scores, scores], dim=1).sort(dim=1, descending=True, stable=True)
        chosen = best.indices[:, :size]  # stable: among equals, what came first stays
        self.scores = best.values[:, :size]
        others = [(self.ends, ends), (self.steps, torch.full_like(ends, step)), (self.parents, parents)]
        self.ends, self.steps, self.parents = (torch.cat(x, dim=1).gather(1, chosen) for x in others)

    def check(self, step: int, best_running: Tensor) -> None:
        """Rows are done when no running beam can still overtake their worst finished text."""
        worst = self.scores[:, -1]
        self.done = self.done | ((worst > -torch.inf) & (worst >= best_running.double() / self.lengths[step + 2]))


@torch.no_grad()
def write_beams_static(context: Context, settings: TextSettings, banned: Sequence[int] = ()) -> list[list[WrittenText]]:
    """`text.write_beams` with a static cache: beams share what they have in common, and change places by number."""
    context.flush()
    model, device, width, most = context.model, context.mask.device, settings.num_beams, settings.max_new_tokens
    batch, pad, count = len(context.mask), model.config.pad_token_id, beam_candidates(model, settings.num_beams)
    processors = score_processors(model, settings, device, banned)
    ends = torch.tensor(end_tokens(model), device=device)
    history = torch.full((batch * width, 1), model.config.bos_token_id, device=device)
    first = torch.arange(batch, device=device)[:, None] * width
    lengths = torch.tensor([max(n, 1) ** settings.length_penalty for n in range(most + 3)], dtype=torch.float64)
    finished = _Finished(batch, width, lengths.to(device))
    trace: list[tuple[Tensor, Tensor]] = []  # parents and tokens of every step
    with borrow(model, Room.needed(context, width, most)) as decoder:
        decoder.load(context, width)
        scores = torch.full((batch, width), -1e9, device=device, dtype=decoder.logits.dtype)
        scores[:, 0] = 0
        for step in range(most):
            ranked = processors(history, decoder.logits.log_softmax(-1)) + scores.view(-1)[:, None]
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
            if step + 1 == most or (step % AHEAD == AHEAD - 1 and bool(finished.done.all())):
                break
            decoder.reorder(parents)
            decoder.read(tokens, torch.ones_like(tokens, dtype=torch.bool))
    return _texts(finished, trace, scores, history, settings)


def _texts(
    finished: _Finished,
    trace: list[tuple[Tensor, Tensor]],
    scores: Tensor,
    history: Tensor,
    settings: TextSettings,
) -> list[list[WrittenText]]:
    """The finished texts of every row, followed back from their ends; running ones count where a row is not done."""
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
