"""A contact sheet: documents with their images and texts, to look at."""

from __future__ import annotations

from collections.abc import Sequence

import PIL.Image
from PIL import ImageDraw, ImageFont

from mm_interleaved.document import Document, Image, Text

MARGIN = 8
FONT_SIZE = 13
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont  # Pillow without FreeType has the second
INK, PROMPT_INK = (20, 20, 20), (130, 130, 150)  # learned text, given text
FRAMES = {True: (60, 150, 80), False: (170, 170, 185)}  # around learned and given images


def contact_sheet(documents: Sequence[Document], cell: int = 192, columns: int = 6) -> PIL.Image.Image:
    """Each document is a row (or more) of cells, images and texts in reading order.

    Text that is given and not learned is gray; images that are learned have a green frame.

    Args:
        documents: with images in memory.
        cell: side of a cell in pixels.
        columns: cells in a row.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    blocks = [_block(document, cell, columns, font) for document in documents]
    sheet = PIL.Image.new("RGB", (blocks[0].width, sum(b.height for b in blocks)), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet


def _block(document: Document, cell: int, columns: int, font: Font) -> PIL.Image.Image:
    groups: list[list[Text] | Image] = []
    for segment in document.segments:
        if isinstance(segment, Text) and groups and isinstance(groups[-1], list):
            groups[-1].append(segment)
        else:
            groups.append([segment] if isinstance(segment, Text) else segment)
    tiles = [_words(g, cell, font) if isinstance(g, list) else _image(g, cell) for g in groups]
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + MARGIN for row in rows]
    block = PIL.Image.new("RGB", (columns * (cell + MARGIN) + MARGIN, sum(heights) + 2 * MARGIN + FONT_SIZE), "white")
    pen = ImageDraw.Draw(block)
    pen.line([(0, 1), (block.width, 1)], fill=(200, 200, 210))
    pen.text((MARGIN, 4), document.name, fill=(90, 90, 200), font=font)
    top = FONT_SIZE + MARGIN + 4
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            block.paste(tile, (MARGIN + column * (cell + MARGIN), top))
        top += height
    return block


def _image(image: Image, cell: int) -> PIL.Image.Image:
    assert isinstance(image.source, PIL.Image.Image), "sheets are made of documents in memory"
    tile = PIL.Image.new("RGB", (cell, cell), FRAMES[image.supervise])
    tile.paste(image.source.resize((cell - 4, cell - 4), PIL.Image.Resampling.BICUBIC), (2, 2))
    return tile


def _words(texts: list[Text], cell: int, font: Font) -> PIL.Image.Image:
    lines = [(line, INK if t.supervise else PROMPT_INK) for t in texts for line in _wrapped(t.text or "", cell, font)]
    step = FONT_SIZE + 4
    tile = PIL.Image.new("RGB", (cell, max(cell, step * len(lines) + 4)), (248, 248, 250))
    pen = ImageDraw.Draw(tile)
    for number, (line, ink) in enumerate(lines):
        pen.text((4, 2 + number * step), line, fill=ink, font=font)
    return tile


def _wrapped(text: str, cell: int, font: Font) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > cell - 8 and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
