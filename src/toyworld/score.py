"""How well the objects detected in an image agree with the scene that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

from .detector import Detection
from .kinds import KINDS
from .scene import GRID, RELATIONS, Attributes, Scene, SceneObject

Relation = tuple[
    int, str, int
]  # number of an object, of `RELATIONS`, number of another: "the first is <relation> the other"

APART = 1 / 12  # by how much more of the image one must be further left or up than the other: a quarter of a cell
CENTERED = 1 / 12  # within how much of its host's middle an object inside it lies
HIDDEN = 0.1  # share of an object's box, at least, that the box of an object in front of it covers


@dataclass(frozen=True)
class SceneScore:
    """Counts; add them up over images.

    Attributes:
        requested: objects asked for.
        found_kind: of those, seen with the right kind, each seen object standing for one.
        found_kind_color: of those asked for, seen with the right kind and colour.
        right_texture: of those found by kind, with the right texture; "plain" counts as one.
        right_part: the same for what is worn; "none" counts.
        right_glyph: the same for glyphs; having none counts.
        right_size: the same for sizes.
        right_cell: of those found by kind, whose middle lies in the cell asked for.
        glyphs: objects asked for with a glyph, found or not.
        glyphs_read: of those, found by kind and with that glyph.
        relations: relations asked for.
        relations_right: of those, that hold between the objects found for them.
        unsaid: objects of a story whose attributes no text states, so that only an earlier image shows them.
        kept: of those, found with their whole attributes.
        kept_kind, kept_color, kept_texture, kept_part, kept_glyph: of those, found with this trait.
        extras: detected objects that were not asked for, or not that often.
        perfect: images in which every object asked for has its kind and colour, every relation holds, and nothing else
            is seen.
        images: 1; the number of images after adding up.
    """

    requested: int = 0
    found_kind: int = 0
    found_kind_color: int = 0
    right_texture: int = 0
    right_part: int = 0
    right_glyph: int = 0
    right_size: int = 0
    right_cell: int = 0
    glyphs: int = 0
    glyphs_read: int = 0
    relations: int = 0
    relations_right: int = 0
    unsaid: int = 0
    kept: int = 0
    kept_kind: int = 0
    kept_color: int = 0
    kept_texture: int = 0
    kept_part: int = 0
    kept_glyph: int = 0
    extras: int = 0
    perfect: int = 0
    images: int = 0

    def __add__(self, other: SceneScore) -> SceneScore:
        return SceneScore(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def ratios(self) -> dict[str, tuple[int, int]]:
        """Each count and what it is out of; `extras` is out of the objects asked for."""
        totals = {
            "found_kind": self.requested,
            "found_kind_color": self.requested,
            **{field.name: self.found_kind for field in fields(self) if field.name.startswith("right_")},
            "glyphs_read": self.glyphs,
            "relations_right": self.relations,
            **{field.name: self.unsaid for field in fields(self) if field.name.startswith("kept")},
            "extras": self.requested,
            "perfect": self.images,
        }
        return {name: (getattr(self, name), total) for name, total in totals.items()}

    def rates(self) -> dict[str, float]:
        """`ratios` as shares; what was never asked for is left out."""
        return {name: count / total for name, (count, total) in self.ratios().items() if total}


def stated(scene: Scene) -> list[Relation]:
    """Every relation that holds in a scene, each pair one way round: what `match` takes as asked for by default."""
    number = len(scene.objects)
    found = [(a, relation, b) for a in range(number) for b in range(a + 1, number) for relation in scene.relation(a, b)]
    hosted = [(b, obj.place, obj.host) for b, obj in enumerate(scene.objects) if obj.host is not None]
    return found + [relation for relation in hosted if relation not in found]


def holds(relation: str, a: Detection, b: Detection) -> bool:
    """Return whether "a is <relation> b" holds for two detected objects.

    Left of, right of, above, below: the middles of their boxes are at least `APART` apart in that direction.
    Inside: a is small, b big and hollow, and a's middle within `CENTERED` of b's in both directions.
    Behind: b's box covers at least `HIDDEN` of a's and a is not inside b. Boxes do not tell which of two is in front.

    Raises:
        ValueError: there is no such relation.
    """
    (ax, ay), (bx, by) = a.center, b.center
    fits = a.size == "small" and b.size == "big" and KINDS[b.attributes.kind].hollow
    inside = fits and max(abs(ax - bx), abs(ay - by)) <= CENTERED
    if relation == "inside":
        return inside
    if relation == "behind":
        return not inside and _covered(a.box, b.box) >= HIDDEN
    shifts = {"left of": bx - ax, "right of": ax - bx, "above": by - ay, "below": ay - by}
    if relation not in shifts:
        raise ValueError(f"unknown relation {relation!r}; there are {', '.join(RELATIONS)}")
    return shifts[relation] >= APART


def _covered(inner: tuple[float, ...], outer: tuple[float, ...]) -> float:
    """Share of the first box that lies in the second."""
    width = min(inner[2], outer[2]) - max(inner[0], outer[0])
    height = min(inner[3], outer[3]) - max(inner[1], outer[1])
    area = (inner[2] - inner[0]) * (inner[3] - inner[1])
    return max(width, 0.0) * max(height, 0.0) / area if area > 0 else 0.0


def pair(scene: Scene, seen: Sequence[Detection]) -> dict[int, int]:
    """Assign detected objects to the objects of a scene: the number of the object to that of the detected one.

    Only pairs of the same kind. Greedy, the best pair first: the right colour, then the more of texture, part, glyph
    and size right, then the nearer to the cell asked for, then the order in which they are listed. No other assignment
    finds more objects by kind, or more by kind and colour.
    """
    options = []
    for i, obj in enumerate(scene.objects):
        for j, one in enumerate(seen):
            if one.attributes.kind == obj.attributes.kind:
                agreed = sum(_traits(obj, one).values())
                options.append((one.attributes.color != obj.attributes.color, -agreed, _distance(obj, one), i, j))
    found: dict[int, int] = {}
    for *_, i, j in sorted(options):
        if i not in found and j not in found.values():
            found[i] = j
    return found


def _traits(obj: SceneObject, one: Detection) -> dict[str, bool]:
    right = {
        name: getattr(obj.attributes, name) == getattr(one.attributes, name) for name in ("texture", "part", "glyph")
    }
    return right | {"size": obj.size == one.size}


def _kept(pairs: Sequence[tuple[SceneObject, Detection]]) -> dict[str, int]:
    kept = {"kept": sum(obj.attributes == one.attributes for obj, one in pairs)}
    for trait in fields(Attributes):
        same = (getattr(obj.attributes, trait.name) == getattr(one.attributes, trait.name) for obj, one in pairs)
        kept[f"kept_{trait.name}"] = sum(same)
    return kept


def _distance(obj: SceneObject, one: Detection) -> float:
    x, y = one.center
    return (x - (obj.column + 0.5) / GRID) ** 2 + (y - (obj.row + 0.5) / GRID) ** 2


def match(scene: Scene, seen: Sequence[Detection], relations: Sequence[Relation] | None = None,
          unsaid: Sequence[int] = ()) -> SceneScore:  # fmt: skip
    """Compare the objects of a scene with those that were detected.

    Args:
        scene: what was asked for.
        seen: what a `Detector` found in the image.
        relations: those that were asked for; if not given, all that hold in the scene, each pair one way round.
        unsaid: numbers of the objects whose attributes only an earlier image shows.

    Returns:
        Counts for this image; see `SceneScore` for what each means, `pair` for which is compared with which and
        `holds` for when a relation is right. A relation of which either object was not found by kind is wrong.
    """
    found = pair(scene, seen)
    asked = stated(scene) if relations is None else list(relations)
    right = [a in found and b in found and holds(relation, seen[found[a]], seen[found[b]]) for a, relation, b in asked]
    pairs = [(scene.objects[i], seen[j]) for i, j in found.items()]
    colored = sum(obj.attributes.color == one.attributes.color for obj, one in pairs)
    traits = [_traits(obj, one) for obj, one in pairs]
    return SceneScore(
        requested=len(scene.objects),
        found_kind=len(pairs),
        found_kind_color=colored,
        **{f"right_{name}": sum(one[name] for one in traits) for name in ("texture", "part", "glyph", "size")},
        right_cell=sum(obj.cell == one.cell for obj, one in pairs),
        glyphs=sum(bool(obj.attributes.glyph) for obj in scene.objects),
        glyphs_read=sum(obj.attributes.glyph == one.attributes.glyph != "" for obj, one in pairs),
        relations=len(asked),
        relations_right=sum(right),
        unsaid=len(unsaid),
        **_kept([(scene.objects[i], seen[found[i]]) for i in unsaid if i in found]),
        extras=len(seen) - len(pairs),
        perfect=int(colored == len(scene.objects) == len(seen) and all(right)),
        images=1,
    )
