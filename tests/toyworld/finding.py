"""An independent, simple reading of noun phrases, to check what the grammar says."""

from __future__ import annotations

import re

from toyworld.kinds import KINDS
from toyworld.scene import COLORS, Scene

COLOR = {c: c for c in COLORS} | {"grey": "gray"}
TEXTURE = {
    "plain": "plain", "striped": "striped", "stripy": "striped", "stripes": "striped", "dotted": "dotted",
    "spotted": "dotted", "dots": "dotted", "spots": "dotted", "checked": "checked", "checkered": "checked",
    "checks": "checked",
}  # fmt: skip
SIZE = {"small": "small", "little": "small", "big": "big", "large": "big"}
PART = {w: w for w in ("hat", "crown", "bow", "flag")}
CELLS = {
    0: "(?:top|upper) left", 2: "(?:top|upper) right", 6: "(?:bottom|lower) left", 8: "(?:bottom|lower) right",
    1: "at the top", 7: "at the bottom", 3: "on the left", 5: "on the right", 4: "middle|center",
}  # fmt: skip
RELATION = {
    r"left of": "left of", r"right of": "right of", r"above|higher up than": "above",
    r"below|under|underneath|lower down than": "below", r"inside": "inside", r"behind|hidden by": "behind",
}  # fmt: skip
_KIND = {k.name: k.name for k in KINDS.values()} | {k.plural: k.name for k in KINDS.values()}


def cell_of(text: str) -> int | None:
    """The cell that a phrase names."""
    for cell, pattern in CELLS.items():
        if re.search(rf"\b(?:{pattern})\b(?! of)", text):
            return cell
    return None


def split_relation(text: str) -> tuple[str, str, str] | None:
    """(what comes before, the relation, what comes after) of the first relation in a phrase."""
    for pattern, relation in RELATION.items():
        found = re.search(rf"^(.*?)\b(?:{pattern})\b(.*)$", text)
        if found:
            return found[1], relation, found[2]
    return None


def find(scene: Scene, phrase: str) -> list[int]:
    """Numbers of the objects that a phrase such as "the red fox with a hat" fits."""
    words = re.findall(r"[A-Za-z0-9]+", phrase)
    kinds = [_KIND[w] for w in words if w in _KIND]
    glyph = re.search(r"\b(?:letter|number|marked|an?) ([A-Z0-9])\b", phrase)
    found = []
    for index, obj in enumerate(scene.objects):
        attributes = obj.attributes
        fits = kinds == [attributes.kind]
        for table, value in (
            (COLOR, attributes.color),
            (TEXTURE, attributes.texture),
            (SIZE, obj.size),
            (PART, attributes.part),
        ):
            fits &= all(table[w] == value for w in words if w in table)
        if fits and (glyph is None or glyph[1] == attributes.glyph):
            found.append(index)
    return found
