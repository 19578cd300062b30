"""Packed rows as an image for people: text with the images in their places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from ..processor import Batch, MMInterleavedProcessor

WIDTH, MARGIN, FONT, THUMBNAIL, GAP = 1200, 16, 15, 112, 6
Font = PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont  # Pillow without FreeType has the second
MAX_HEIGHT = 520  # of one row of tokens; what is longer ends in "..."
INK, PALE, RULE, LEARNED, GIVEN = "#202020", "#9a9a9a", "#d0d0d0", "#2e7d32", "#b0b0b0"


@dataclass(frozen=True)
class _Piece:
    """A word, an image, or the start of a document."""

    content: str | PIL.Image.Image | None
    learned: bool


def contact_sheet(batches: Sequence[Batch], processor: MMInterleavedProcessor, rows: int = 2) -> PIL.Image.Image:
    """The first rows of some batches, one under another.

    What is learned is black or framed in green, what is only given is grey. A bar stands where a document starts.

    Args:
        batches: with labels.
        processor: that made them.
        rows: how many of each batch.
    """
    panels = []
    for batch in batches:
        for row in range(min(rows, len(batch.input_ids))):
            title = f"{batch.source or 'batch'}, row {row}: {int(batch.attention_mask[row].sum())} tokens"
            panels.append(_panel(title, list(_pieces(batch, row, processor))))
    sheet = PIL.Image.new("RGB", (WIDTH, max(sum(p.height for p in panels), 1)), "white")
    top = 0
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height
    return sheet


def _pieces(batch: Batch, row: int, processor: MMInterleavedProcessor) -> Iterator[_Piece]:
    mask = batch.attention_mask[row].bool()
    ids = batch.input_ids[row][mask].tolist()
    learned = ((batch.labels[row][mask] != -100).numpy() if "labels" in batch else np.ones(len(ids), bool)).tolist()
    images = iter(np.flatnonzero(batch.image_rows.numpy() == row).tolist())
    run: list[int] = []
    flag = False
    for token, is_learned in [*zip(ids, learned, strict=True), (None, False)]:
        special = token is None or token in (processor.soi_token_id, processor.tokenizer.bos_token_id)
        if run and (special or is_learned != flag):
            yield from (_Piece(word, flag) for word in processor.decode_text(run).split())
            run = []
        if token == processor.tokenizer.bos_token_id:
            yield _Piece(None, False)
        elif token == processor.soi_token_id:
            index = next(images)
            supervised = "image_loss_mask" not in batch or bool(batch.image_loss_mask[index])
            yield _Piece(PIL.Image.fromarray(batch.pixel_values[index].permute(1, 2, 0).numpy()), supervised)
        elif token is not None and token != processor.image_token_id:
            run.append(token)
            flag = is_learned


def _panel(title: str, pieces: Sequence[_Piece]) -> PIL.Image.Image:
    """One row of tokens, set like a text."""
    panel = PIL.Image.new("RGB", (WIDTH, MAX_HEIGHT), "white")
    draw, font = PIL.ImageDraw.Draw(panel), PIL.ImageFont.load_default(FONT)
    draw.text((MARGIN, GAP), title, fill=LEARNED, font=font)
    left, top, height = MARGIN, 2 * GAP + FONT + 4, FONT + GAP
    for piece in pieces:
        width, tall = _size(piece, draw, font)
        if left + width > WIDTH - MARGIN:
            left, top, height = MARGIN, top + height, FONT + GAP
        if top + tall > MAX_HEIGHT - FONT - GAP:
            draw.text((left, top), "...", fill=PALE, font=font)
            break
        _place(panel, draw, font, piece, left, top)
        left, height = left + width, max(height, tall)
    bottom = min(top + height + GAP, MAX_HEIGHT)
    draw.line([(0, bottom - 1), (WIDTH, bottom - 1)], fill=RULE)
    return panel.crop((0, 0, WIDTH, bottom))


def _size(piece: _Piece, draw: PIL.ImageDraw.ImageDraw, font: Font) -> tuple[int, int]:
    if piece.content is None:
        return 3 * GAP, FONT + GAP
    if isinstance(piece.content, str):
        return int(draw.textlength(piece.content + " ", font=font)) + 1, FONT + GAP
    return THUMBNAIL + GAP, THUMBNAIL + GAP


def _place(
    panel: PIL.Image.Image,
    draw: PIL.ImageDraw.ImageDraw,
    font: Font,
    piece: _Piece,
    left: int,
    top: int,
) -> None:
    if piece.content is None:
        draw.rectangle([left + GAP, top, left + GAP + 2, top + FONT + 2], fill=LEARNED)
    elif isinstance(piece.content, str):
        draw.text((left, top), piece.content, fill=INK if piece.learned else PALE, font=font)
    else:
        frame = LEARNED if piece.learned else GIVEN
        draw.rectangle([left, top, left + THUMBNAIL - 1, top + THUMBNAIL - 1], fill=frame)
        inner = piece.content.resize((THUMBNAIL - 6, THUMBNAIL - 6), PIL.Image.Resampling.BICUBIC)
        panel.paste(inner, (left + 3, top + 3))
