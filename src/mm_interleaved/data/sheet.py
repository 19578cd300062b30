"""Contact sheets: packed rows as one image, text with its images in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from ..document import Box
from ..processor import Batch, MMInterleavedProcessor

WIDTH, MARGIN, FONT, THUMBNAIL, FRAME, GAP = 1200, 16, 15, 106, 3, 6
Font = PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont  # Pillow without FreeType has the second
MAX_HEIGHT = 520  # most pixels of one row of tokens; longer ones end in "..."
INK, PALE, RULE, LEARNED, GIVEN = "#202020", "#9a9a9a", "#d0d0d0", "#2e7d32", "#b0b0b0"


END = "</s>"  # the content of a piece that ends a document


@dataclass(frozen=True)
class Piece:
    """A text, an image with the boxes in it, the end of a document (`END`), or its start (None)."""

    content: str | PIL.Image.Image | None
    learned: bool
    boxes: Sequence[tuple[int, Box]] = ()


def contact_sheet(batches: Sequence[Batch], processor: MMInterleavedProcessor, rows: int = 2) -> PIL.Image.Image:
    """Return the first rows of some batches, one under another; long ones end in "...".

    Args:
        batches: with labels.
        processor: that made them.
        rows: how many of each batch.
    """
    panels = []
    for batch in batches:
        for row in range(min(rows, len(batch.input_ids))):
            title = f"{batch.source or 'batch'}, row {row}: {int(batch.attention_mask[row].sum())} tokens"
            panels.append((title, _small_pieces(row_pieces(batch, row, processor))))
    return draw_panels(panels)


def draw_panels(panels: Iterable[tuple[str, Iterable[Piece]]], max_height: int = MAX_HEIGHT) -> PIL.Image.Image:
    """Return panels one under another.

    What is learned is black or framed in green, what is only given is grey. A bar stands where a document starts.

    Args:
        panels: a title, and what stands below it like a text.
        max_height: of a panel in pixels; what is longer ends in "...".
    """
    drawn = [_panel(title, pieces, max_height) for title, pieces in panels]
    sheet = PIL.Image.new("RGB", (WIDTH, max(sum(p.height for p in drawn), 1)), "white")
    top = 0
    for panel in drawn:
        sheet.paste(panel, (0, top))
        top += panel.height
    return sheet


def row_pieces(batch: Batch, row: int, processor: MMInterleavedProcessor) -> Iterator[Piece]:
    """Return the parts of a row: runs of text with a loss or without, `</s>`, images as they are fed, and starts.

    Args:
        batch: a batch of the loader.
        row: number of the row.
        processor: that made the batch.
    """
    mask = batch.attention_mask[row].bool()
    ids = batch.input_ids[row][mask].tolist()
    learned = ((batch.labels[row][mask] != -100).numpy() if "labels" in batch else np.ones(len(ids), bool)).tolist()
    images = iter(np.flatnonzero(batch.image_rows.numpy() == row).tolist())
    tokens = processor.tokenizer
    borders = (None, processor.soi_token_id, tokens.bos_token_id, tokens.eos_token_id)
    run: list[int] = []
    flag, before = False, None
    for token, is_learned in [*zip(ids, learned, strict=True), (None, False)]:
        if run and (token in borders or is_learned != flag):
            yield Piece(processor.decode_text(run), flag)
            run = []
        if token == tokens.bos_token_id:
            yield Piece(None, False)
        elif token == tokens.eos_token_id:
            yield Piece(END, is_learned)
        elif token == processor.soi_token_id:
            index = next(images)
            supervised = "image_loss_mask" not in batch or bool(batch.image_loss_mask[index])
            supervised &= before != tokens.bos_token_id  # an image that nothing precedes has no loss
            seen = PIL.Image.fromarray(batch.pixel_values[index].permute(1, 2, 0).numpy())
            yield Piece(seen, supervised, batch.boxes[index] if batch.boxes else ())
        elif token is not None and token != processor.image_token_id:
            run.append(token)
            flag = is_learned
        before = token


def _small_pieces(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces with texts as single words and images as thumbnails, without `</s>`."""
    for piece in pieces:
        content = piece.content
        if isinstance(content, PIL.Image.Image):
            size = (THUMBNAIL, THUMBNAIL)
            yield Piece(content.resize(size, PIL.Image.Resampling.BICUBIC), piece.learned)
        elif content is None:
            yield piece
        elif content != END:
            yield from (Piece(word, piece.learned) for word in content.split())


def _panel(title: str, pieces: Iterable[Piece], max_height: int) -> PIL.Image.Image:
    """Words and images, set like a text."""
    panel = PIL.Image.new("RGB", (WIDTH, max_height), "white")
    draw, font = PIL.ImageDraw.Draw(panel), PIL.ImageFont.load_default(FONT)
    draw.text((MARGIN, GAP), title, fill=LEARNED, font=font)
    left, top, height = MARGIN, 2 * GAP + FONT + 4, FONT + GAP
    for piece in pieces:
        width, tall = _size(piece, draw, font)
        if left + width > WIDTH - MARGIN:
            left, top, height = MARGIN, top + height, FONT + GAP
        if top + tall > max_height - FONT - GAP:
            draw.text((left, top), "...", fill=PALE, font=font)
            break
        _place(panel, draw, font, piece, left, top)
        left, height = left + width, max(height, tall)
    bottom = min(top + height + GAP, max_height)
    draw.line([(0, bottom - 1), (WIDTH, bottom - 1)], fill=RULE)
    return panel.crop((0, 0, WIDTH, bottom))


def _size(piece: Piece, draw: PIL.ImageDraw.ImageDraw, font: Font) -> tuple[int, int]:
    if piece.content is None:
        return 3 * GAP, FONT + GAP
    if isinstance(piece.content, str):
        return int(draw.textlength(piece.content + " ", font=font)) + 1, FONT + GAP
    return piece.content.width + 2 * FRAME + GAP, piece.content.height + 2 * FRAME + GAP


def _place(
    panel: PIL.Image.Image, draw: PIL.ImageDraw.ImageDraw, font: Font, piece: Piece, left: int, top: int
) -> None:
    if piece.content is None:
        draw.rectangle([left + GAP, top, left + GAP + 2, top + FONT + 2], fill=LEARNED)
    elif isinstance(piece.content, str):
        draw.text((left, top), piece.content, fill=INK if piece.learned else PALE, font=font)
    else:
        width, height = piece.content.size
        frame = [left, top, left + width + 2 * FRAME - 1, top + height + 2 * FRAME - 1]
        draw.rectangle(frame, fill=LEARNED if piece.learned else GIVEN)
        panel.paste(piece.content, (left + FRAME, top + FRAME))
