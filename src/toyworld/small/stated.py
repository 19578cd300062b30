"""What a text states about a scene, as numbers: the targets of the probe on the conditioning tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..detector import TRAITS
from ..language import Caption
from ..language.phrases import CELL_NAMES
from ..scene import GRID, GROUNDS, RELATIONS, SIZES

OBJECTS = 5  # the most that a text mentions
_VALUES: dict[str, tuple[str, ...]] = {
    **TRAITS, "size": SIZES, "cell": tuple(CELL_NAMES[cell] for cell in range(GRID * GRID)), "relation": RELATIONS,
}  # fmt: skip
STATED = {"there": 2, **{name: len(values) for name, values in _VALUES.items()}, "other": OBJECTS}
"""The number of values of each fact about an object: whether there is one, its traits, its relation to which other."""
GROUND = {"ground": len(GROUNDS)}


def stated_facts(text: Caption) -> tuple[Tensor, Tensor]:
    """Return what a text states of the objects, in the order in which it mentions them, and of the ground.

    Returns:
        int64 [OBJECTS, len(STATED)] and a scalar: numbers of values, -100 for what the text does not state. Of several
        relations of an object the first counts.
    """
    order: dict[int | None, int] = {}
    for fact in text.facts:
        if fact.name == "object" and len(order) < OBJECTS:
            order.setdefault(fact.obj, len(order))
    names, found = list(STATED), torch.full((OBJECTS, len(STATED)), -100)
    found[:, 0] = torch.arange(OBJECTS) < len(order)
    ground = torch.tensor(-100)
    for fact in text.facts:
        place = order.get(fact.obj)
        if fact.name == "ground":
            ground = torch.tensor(GROUNDS.index(fact.value))
        elif place is not None:
            column = names.index("kind" if fact.name == "object" else fact.name)
            if found[place, column] == -100:
                found[place, column] = _VALUES[names[column]].index(fact.value)
                if fact.name == "relation":
                    found[place, names.index("other")] = order.get(fact.other, -100)
    return found, ground
