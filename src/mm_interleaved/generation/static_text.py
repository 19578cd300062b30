"""Writing text over a `StaticDecoder`: the next tokens are on their way before the host looks at the last.

The loops of `text.py` ask after every token which rows go on; here that is decided on the device, and the host reads
the tokens of a step while the device computes the steps after it. Steps that turn out to be too many write into columns
that no row has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .context import Context, send
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

WINDOW = {"cuda": 3, "cpu": 1}  # steps that are under way at a time; a CPU gains nothing from more than one


class _Message:
    """Numbers on their way from the device to the host, which waits for them only when it wants to read them."""

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
    """One step under way: what it tells the host, its logits, and where the generators were before it."""

    told: _Message  # [3, rows] tokens, rows that wrote, rows that go on
    logits: Tensor
    before: list[Tensor]


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
    processors = score_processors(model, settings, device, banned)
    ends = torch.tensor(end_tokens(model), device=device)
    history, active, limits = rows_to_write(model, settings, context.mask, active, limits)
    most = int(torch.where(active, limits, 0).max())
    if most == 0:
        return
    under_way: deque[_Step] = deque()
    with borrow(model, Room.needed(context, 1, most)) as decoder:
        decoder.load(context)
        columns = 0  # that some row has read
        try:
            while True:
                while len(under_way) < WINDOW.get(device.type, 1) and history.shape[1] <= most:
                    before = [g.get_state() for g in generators] if settings.do_sample else []
                    logits = decoder.logits.clone()
                    scores = processors(history, logits)
                    numbers = send(uniform(generators), device) if settings.do_sample else None
                    tokens = scores.argmax(-1) if numbers is None else draw(scores, numbers)
                    tokens = torch.where(active, tokens, model.config.pad_token_id)
                    history = torch.cat([history, tokens[:, None]], dim=1)
                    read = active & (tokens[:, None] != ends).all(-1)
                    told = _Message(torch.stack([tokens, active.long(), read.long()]))
                    decoder.read(tokens, read)
                    under_way.append(_Step(told, logits, before))
                    active = read & (history.shape[1] - 1 < limits)
                if not under_way:
                    return
                tokens, wrote, read = under_way[0].told.read()
                if not wrote.any():
                    return
                columns += bool(read.any())
                yield TextStep(tokens, wrote.bool(), under_way.popleft().logits)
        finally:
            if under_way:  # steps too many: their numbers are given back
                for generator, state in zip(generators, under_way[0].before, strict=False):
                    generator.set_state(state)
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
    under_way: deque[_Message] = deque()  # of every step, whether all rows are done after it
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
            under_way.append(_Message(finished.done.all()))
            if step + 1 == most or (len(under_way) == WINDOW.get(device.type, 1) and under_way.popleft().read()):
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
