"""The rules of text generation: score processors, end tokens, the choice of a token, beam hypotheses.

The rules are those of the library version that the original was pinned to, because released settings depend on them
(docs/model.md, "Text generation"). The processors get `<s>` and the new tokens, not the prompt. Beams keep
(1 + end tokens) * num_beams candidates a step, so that end tokens cannot starve them. One thing is fixed: a beam keeps
the end token that finished it.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..model import MMInterleavedModel
from .settings import TextSettings


@dataclass
class WrittenText:
    """One generated text.

    Attributes:
        ids: its tokens, without `<s>` and without the end token.
        end: the end token; None: it reached a limit.
        score: for beams, the score by which it was ranked.
        at_context_end: whether the limit was the end of the model's context, before max_new_tokens.
    """

    ids: list[int]
    end: int | None = None
    score: float | None = None
    at_context_end: bool = False

    @property
    def all_ids(self) -> list[int]:
        """Its tokens with the end token."""
        return self.ids + ([] if self.end is None else [self.end])


@dataclass
class TextStep:
    """One step of greedy search or sampling.

    Attributes:
        tokens: [B] the new tokens; the pad token in finished rows.
        active: [B] bool, the rows that got a token.
        logits: [B, V] float32, before any processing.
    """

    tokens: Tensor
    active: Tensor
    logits: Tensor


def end_tokens(model: MMInterleavedModel) -> list[int]:
    """The tokens that end a text: `</s>` and begin-of-image."""
    return [model.config.eos_token_id, model.config.soi_token_id]


def rows_to_write(
    model: MMInterleavedModel, rows: int, device: torch.device, active: Tensor | None, limits: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The start of generation: the history [B, 1], which rows are active [B], and the most tokens of each [B].

    `active` is [B] bool; None: all rows. A row whose limit is 0 is not active.
    """
    history = torch.full((rows, 1), model.config.bos_token_id, device=device)
    most = torch.tensor(limits, device=device)
    on = torch.ones(rows, dtype=torch.bool, device=device) if active is None else active.to(device)
    return history, on & (most > 0), most


def score_processors(
    model: MMInterleavedModel, settings: TextSettings, device: torch.device, banned: Sequence[int]
) -> LogitsProcessorList:
    """The processors that change the scores of a step before a token is chosen; none of them synchronises."""
    where: Any = device  # the library's annotation accepts names of devices only
    processors = LogitsProcessorList()
    if banned:
        processors.append(SuppressTokensLogitsProcessor(list(banned), device=where))
    if settings.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.min_new_tokens:  # the processor also counts <s>
        processors.append(MinLengthLogitsProcessor(settings.min_new_tokens + 1, end_tokens(model), device=where))
    if settings.do_sample:
        if settings.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            processors.append(TopPLogitsWarper(settings.top_p))
    return processors


def uniform(generators: Sequence[torch.Generator]) -> Tensor:
    """A number in [0, 1) from each row's generator, [B], on the generators' device."""
    return torch.cat([torch.rand(1, generator=g, device=g.device) for g in generators])


def choose_token(scores: Tensor, numbers: Tensor) -> Tensor:
    """Sample a token of each row from softmax(scores), by inverting the distribution at `numbers` [B] in [0, 1)."""
    cumulative = scores.softmax(-1).cumsum(-1)
    token = torch.searchsorted(cumulative, (numbers * cumulative[:, -1].float())[:, None].to(cumulative), right=True)
    return token[:, 0].clamp(max=scores.shape[-1] - 1)


def beam_candidates(model: MMInterleavedModel, num_beams: int) -> int:
    """The number of candidates that a step of beam search ranks."""
    return max(2, 1 + len(end_tokens(model))) * num_beams


def _score(text: WrittenText) -> float:
    assert text.score is not None  # beam search ranks all its texts
    return text.score


class Hypotheses:
    """The best finished texts of one row."""

    def __init__(self, size: int, length_penalty: float) -> None:
        self.size, self.length_penalty = size, length_penalty
        self.finished: list[WrittenText] = []

    def add(self, ids: list[int], end: int | None, log_probability: float) -> None:
        """Add a finished text; `ids` start with `<s>`, which counts for the length."""
        score = log_probability / len(ids) ** self.length_penalty
        if len(self.finished) == self.size and score <= self.finished[-1].score:
            return
        self.finished.append(WrittenText(ids[1:], end, score))
        self.finished.sort(key=lambda text: -_score(text))
        del self.finished[self.size :]
