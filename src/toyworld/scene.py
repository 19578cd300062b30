"""What stands in an image, as plain data. Captions, questions, boxes and images all derive from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "gray")
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = ("small", "big")
PARTS = ("none", "hat", "crown", "bow", "flag")
GLYPHS = "ABCDEFGHJKLMNPRSTUVXYZ23456789"  # no pairs that look alike
GROUNDS = ("meadow", "beach", "snow", "night", "sea", "room")
GRID = 3  # scenes are laid out on 3 x 3 cells, rows from the top

Place = Literal["cell", "inside", "behind"]
RELATIONS = ("left of", "right of", "above", "below", "inside", "behind")


@dataclass(frozen=True)
class Attributes:
    """What one recognises an object by, wherever it stands.

    Attributes:
        kind: what it is, a name of `kinds.KINDS`.
        color: its tint, of `COLORS`.
        texture: of `TEXTURES`.
        part: something it wears, of `PARTS`.
        glyph: a letter or digit on it, of `GLYPHS`; "" for none.
    """

    kind: str
    color: str
    texture: str = "plain"
    part: str = "none"
    glyph: str = ""


@dataclass(frozen=True)
class SceneObject:
    """An object in a scene.

    Attributes:
        attributes: what it looks like.
        cell: row * GRID + column of the cell that it stands in.
        size: of `SIZES`.
        offset: shift of its centre from the cell's centre, (x, y), in cells, each in [-0.5, 0.5].
        place: "cell": on its own; "inside" / "behind": in or partly hidden by the object number `host`, in whose cell
            it stands.
        host: index of that object in the scene.
        name: how a story calls it ("Mila"); "" for none.
    """

    attributes: Attributes
    cell: int
    size: str = "big"
    offset: tuple[float, float] = (0.0, 0.0)
    place: Place = "cell"
    host: int | None = None
    name: str = ""

    @property
    def row(self) -> int:
        """Row of its cell, 0 at the top."""
        return self.cell // GRID

    @property
    def column(self) -> int:
        """Column of its cell, 0 at the left."""
        return self.cell % GRID

    def with_attributes(self, **changes: str) -> SceneObject:
        """The same object, looking different."""
        return replace(self, attributes=replace(self.attributes, **changes))


@dataclass(frozen=True)
class Scene:
    """One image's content.

    Attributes:
        objects: 1 to 5 objects; later ones are drawn over earlier ones, but what is behind its host is drawn before it.
        ground: the background, of `GROUNDS`.
        seed: of the random parts of the image (clouds, grass), so that a scene always has the same image.
    """

    objects: tuple[SceneObject, ...] = field(default_factory=tuple)
    ground: str = "meadow"
    seed: int = 0

    def relation(self, a: int, b: int) -> list[str]:
        """What holds between objects number `a` and `b`: "a is <relation> b", of `RELATIONS`. Cells decide; empty if
        they share a cell without one being inside or behind the other.
        """
        first, second = self.objects[a], self.objects[b]
        if first.place in ("inside", "behind") and first.host == b:
            return [first.place]
        if second.host == a and second.place in ("inside", "behind"):
            return []
        found = []
        if first.column != second.column:
            found.append("left of" if first.column < second.column else "right of")
        if first.row != second.row:
            found.append("above" if first.row < second.row else "below")
        return found
