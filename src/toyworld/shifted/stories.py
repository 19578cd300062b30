"""Stories of the shifted world: someone is shown in the first image and then goes by name only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..language.words import choose, say
from ..sampling import Split
from ..scene import GRID, Scene
from ..stories import Frame, Story
from .language import BACKDROPS, item, place
from .world import COLORS, GROUNDS, PLACES, random_scene

NAMES = ("Quix", "Zarn", "Vexo", "Brul", "Thab", "Plim")


def story(rng: np.random.Generator, frames: int, split: Split | None = None) -> Story:
    """A story of that many frames. Only the first text says what its hero is and which colour it has."""
    scene = random_scene(rng, split, 1 + int(rng.random() * 2))
    name = choose(rng, NAMES)
    scene = replace(scene, objects=(replace(scene.objects[0], name=name), *scene.objects[1:]))
    others = "".join(f"; {item(o)} in sector {place(o)}" for o in scene.objects[1:])
    text = say(rng, "[Unit|Subject] {name}: {what} in sector {where}{others}; {ground}.", name=name,
               what=item(scene.objects[0]), where=place(scene.objects[0]), others=others,
               ground=choose(rng, BACKDROPS[scene.ground]))  # fmt: skip
    found = [Frame(text, scene, ())]
    for _ in range(frames - 1):
        text, scene = _change(scene, rng)
        found.append(Frame(text, scene, (0,)))
    return Story(tuple(found), (name,))


def _change(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    hero, *others = scene.objects
    way = choose(rng, ("move", "move", "recolor", "ground"))
    if way == "ground":
        ground = choose(rng, [g for g in GROUNDS if g != scene.ground])
        return f"{hero.name}: backdrop now {ground}.", replace(scene, ground=ground)
    if way == "recolor":
        color = choose(rng, [c for c in COLORS if c != hero.attributes.color])
        return f"{hero.name} turns {color}.", replace(scene, objects=(hero.with_attributes(color=color), *others))
    cell = choose(rng, [c for c in range(GRID * GRID) if c not in {o.cell for o in scene.objects}])
    text = say(rng, "{name} [relocates to|shifts to] sector {where}.", name=hero.name, where=PLACES[cell])
    return text, replace(scene, objects=(replace(hero, cell=cell), *others))
