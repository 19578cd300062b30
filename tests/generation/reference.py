"""A generation state without a KV cache: every step reads whole rows anew, as training does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mm_interleaved import Batch, MMInterleaved
from mm_interleaved.generation.rules import (
    Hypotheses,
    WrittenText,
    beam_candidates,
    end_tokens,
    score_processors,
)
from mm_interleaved.generation.settings import TextSettings
from mm_interleaved.model.language_model import image_features
from mm_interleaved.model.layout import visible_images
from mm_interleaved.model.visual_tokenizer import VisualFeatures


class ReferenceState:
    """Rows as lists of ids and images; `text.write` runs over it as over a `GenerationState`."""

    graphs = False
    device = torch.device("cpu")

    def __init__(self, model: MMInterleaved, ids: Sequence[list[int]], images: Sequence[list[Tensor]]) -> None:
        self.model = model
        self.ids, self.images = [list(row) for row in ids], [list(row) for row in images]
        self.encoded: dict[int, VisualFeatures] = {}

    @classmethod
    def of(cls, model: MMInterleaved, batch: Batch) -> ReferenceState:
        """After reading a batch."""
        ids = [row[mask == 1].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        pixels = iter(batch["pixel_values"])
        images = [[next(pixels) for token in row if token == model.config.soi_token_id] for row in ids]
        return cls(model, ids, images)

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.ids]

    @torch.no_grad()
    def hidden(self, row: int) -> Tensor:
        """[length, D]; what an image encoder says of an image is kept, since tests ask for it at every token."""
        model, ids = self.model, torch.tensor([self.ids[row]])
        found = [self._features(pixels) for pixels in self.images[row]]
        tokens = torch.cat([f.tokens for f in found]) if found else None
        maps = [torch.cat(m) for m in zip(*(f.pyramid for f in found), strict=True)] if found else model.empty_pyramid()
        mask = torch.ones_like(ids)
        visible = visible_images(ids, mask, model.config.bos_token_id, model.config.soi_token_id)
        return model.decode(model.embed(ids, tokens), image_features(model.config, maps), visible, None)[0]

    def _features(self, pixels: Tensor) -> VisualFeatures:
        key = id(pixels)
        if key not in self.encoded:
            self.encoded[key] = self.model.encode_images(pixels[None])
        return self.encoded[key]

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        return torch.stack([self.model.compute_logits(self.hidden(row)[-1]) for row in range(self.rows)])

    def decode_step(self, tokens: Tensor, reading: Tensor) -> Tensor:
        for row, (token, on) in enumerate(zip(tokens.tolist(), reading.tolist(), strict=True)):
            if on:
                self.ids[row].append(token)
        return self.next_logits()

    def reserve_steps(self, steps: int) -> None:
        pass

    def settle(self, lengths: Sequence[int]) -> None:
        self.ids = [ids[:n] for ids, n in zip(self.ids, lengths, strict=True)]

    def branch(self, rows: Sequence[int], width: int = 1, tokens: int = 0) -> ReferenceState:
        chosen = [r for r in rows for _ in range(width)]
        branch = ReferenceState(self.model, [self.ids[r] for r in chosen], [self.images[r] for r in chosen])
        branch.encoded = self.encoded
        return branch

    def reorder(self, rows: Tensor) -> None:
        self.ids = [list(self.ids[r]) for r in rows.tolist()]


class RowBeams(Hypotheses):
    """The finished texts of a row, and whether the search of the row has ended."""

    done = False

    def check(self, best_running: float, length: int) -> None:
        """Set `done` if no running beam can beat the worst finished text."""
        if len(self.finished) == self.size:
            self.done = self.done or self.finished[-1].score >= best_running / length**self.length_penalty


@torch.no_grad()
def reference_beams(
    state: ReferenceState, settings: TextSettings, banned: Sequence[int] = ()
) -> list[list[WrittenText]]:
    """`text.write_beams`, with lists of Python instead of tensors of hypotheses."""
    model, width, batch = state.model, settings.num_beams, state.rows
    ends, pad = end_tokens(model), model.config.pad_token_id
    processors = score_processors(model, settings, torch.device("cpu"), banned)
    beams = state.branch(range(batch), width)
    rows = [RowBeams(width, settings.length_penalty) for _ in range(batch)]
    history = torch.full((batch * width, 1), model.config.bos_token_id)
    scores = torch.full((batch, width), -1e9)
    scores[:, 0] = 0
    scores = scores.view(-1)
    while True:
        ranked = processors(history, beams.next_logits().log_softmax(-1)) + scores[:, None]
        vocab = ranked.shape[-1]
        best, index = ranked.view(batch, -1).topk(beam_candidates(model, width), dim=1)
        plan = []
        for b, row in enumerate(rows):
            if row.done:
                plan += [(b * width, pad, 0.0)] * width
                continue
            running = []
            candidates = zip(best[b].tolist(), (index[b] // vocab).tolist(), (index[b] % vocab).tolist(), strict=True)
            for rank, (score, parent, token) in enumerate(candidates):
                if token in ends:
                    if rank < width:  # an end token ranked lower does not count
                        row.add(history[b * width + parent].tolist(), token, score)
                    continue
                running.append((b * width + parent, token, score))
                if len(running) == width:
                    break
            row.check(float(best[b].max()), history.shape[1] + 1)
            plan += running
        parents, tokens = (torch.tensor(x) for x in list(zip(*plan, strict=True))[:2])
        scores = torch.tensor([s for _, _, s in plan])
        history = torch.cat([history[parents], tokens[:, None]], dim=1)
        if all(row.done for row in rows) or history.shape[1] > settings.max_new_tokens:
            break
        beams.reorder(parents)
        for ids, token in zip(beams.ids, tokens.tolist(), strict=True):
            ids.append(token)
    for b, row in enumerate(rows):
        for i in range(b * width, (b + 1) * width):
            if not row.done:
                row.add(history[i].tolist(), None, float(scores[i]))
    return [row.finished[: settings.num_return_sequences] for row in rows]
