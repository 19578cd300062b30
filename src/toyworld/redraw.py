"""Instructions that change an earlier image without stating again what it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .language.phrases import CELL_NAMES, CELL_WORDS, TEXTURE_WORDS, cell_phrase, glyph_noun, ground_phrase
from .language.words import choose, say, sentence
from .scene import COLORS, GLYPHS, GRID, GROUNDS, PARTS, TEXTURES, Scene, SceneObject

Change = Callable[[Scene, int, str, np.random.Generator], tuple[str, Scene] | None]
"""Returns an instruction about object number `index`, called `who`, and the scene asked for; None: impossible."""


def redrawn(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    """Return an instruction about the image of a scene, and the scene that it asks for.

    Args:
        scene: each of its objects stands in a cell of its own.
        rng: chooses what to change and the words.
    """
    while True:
        index = int(rng.random() * len(scene.objects))
        obj = scene.objects[index]
        alike = sum(t.attributes.kind == obj.attributes.kind for t in scene.objects) > 1
        who = f"the {obj.attributes.kind}" + (f" {cell_phrase(obj, rng)}" if alike else "")
        found = choose(rng, CHANGES)(scene, index, who, rng)
        if found is not None:
            return sentence(found[0]), found[1]


def _with(scene: Scene, index: int, obj: SceneObject) -> Scene:
    return replace(scene, objects=(*scene.objects[:index], obj, *scene.objects[index + 1 :]))


def _free(scene: Scene) -> list[int]:
    taken = {t.cell for t in scene.objects}
    return [c for c in range(GRID * GRID) if c not in taken]


def _again(scene: Scene, index: int, who: str, rng: np.random.Generator) -> tuple[str, Scene]:
    return say(rng, "[draw the same picture again|the same picture once more|copy the picture]"), scene


def _recolor(scene: Scene, index: int, who: str, rng: np.random.Generator) -> tuple[str, Scene]:
    obj = scene.objects[index]
    color = choose(rng, [c for c in COLORS if c != obj.attributes.color])
    text = (
        "[make {who} {color}|draw it again, but make {who} {color}|paint {who} {color}|draw it with {who} in {color}]"
    )
    return say(rng, text, who=who, color=color), _with(scene, index, obj.with_attributes(color=color))


def _retexture(scene: Scene, index: int, who: str, rng: np.random.Generator) -> tuple[str, Scene]:
    obj = scene.objects[index]
    texture = choose(rng, [t for t in TEXTURES if t != obj.attributes.texture])
    word = choose(rng, TEXTURE_WORDS[texture])
    text = "[make {who} {word}|draw it again, but make {who} {word}|now {who} should be {word}]"
    return say(rng, text, who=who, word=word), _with(scene, index, obj.with_attributes(texture=texture))


def _dress(scene: Scene, index: int, who: str, rng: np.random.Generator) -> tuple[str, Scene]:
    obj = scene.objects[index]
    old = obj.attributes.part
    if old != "none":
        text = say(
            rng, "[draw it again, but take the {old} from {who}|take the {old} away from {who}]", old=old, who=who
        )
        return text, _with(scene, index, obj.with_attributes(part="none"))
    part = choose(rng, PARTS[1:])
    text = say(rng, "[give {who} a {part}|draw it again, but give {who} a {part}]", who=who, part=part)
    return text, _with(scene, index, obj.with_attributes(part=part))


def _write(scene: Scene, index: int, who: str, rng: np.random.Generator) -> tuple[str, Scene] | None:
    obj = scene.objects[index]
    if obj.size == "small":
        return None
    glyph = choose(rng, [g for g in GLYPHS if g != obj.attributes.glyph])
    verb = choose(rng, ("write", "put", "draw it again with") if not obj.attributes.glyph else ("now put", "now write"))
    return f"{verb} {glyph_noun(glyph)} on {who}", _with(scene, index, obj.with_attributes(glyph=glyph))


def _move(scene: Scene, index: int, who: str, rng: np.random.Generator) -> tuple[str, Scene]:
    cell = choose(rng, _free(scene))
    where = choose(rng, CELL_WORDS[CELL_NAMES[cell]])
    text = "[draw it again with {who} {where}|put {who} {where}|now {who} should be {where}]"
    obj = replace(scene.objects[index], cell=cell, offset=(0.0, 0.0))
    return say(rng, text, who=who, where=where), _with(scene, index, obj)


def _resize(scene: Scene, index: int, who: str, rng: np.random.Generator) -> tuple[str, Scene] | None:
    obj = scene.objects[index]
    if obj.attributes.glyph:
        return None  # too small to be read
    size = "small" if obj.size == "big" else "big"
    return say(rng, "[make {who} {size}|draw it again, but make {who} {size}]", who=who, size=size), (
        _with(scene, index, replace(obj, size=size))
    )


def _remove(scene: Scene, index: int, who: str, rng: np.random.Generator) -> tuple[str, Scene] | None:
    if len(scene.objects) == 1:
        return None
    left = (*scene.objects[:index], *scene.objects[index + 1 :])
    return say(rng, "[draw it again without {who}|take {who} away]", who=who), replace(scene, objects=left)


def _only(scene: Scene, index: int, who: str, rng: np.random.Generator) -> tuple[str, Scene] | None:
    obj = scene.objects[index]
    if len(scene.objects) == 1 or who != f"the {obj.attributes.kind}":
        return None  # two places in one sentence would confuse
    cell = choose(rng, _free(scene))
    where = choose(rng, CELL_WORDS[CELL_NAMES[cell]])
    text = say(rng, "[draw only {who}, {where}|now only {who}, {where}]", who=who, where=where)
    return text, replace(scene, objects=(replace(obj, cell=cell, offset=(0.0, 0.0)),))


def _ground(scene: Scene, index: int, who: str, rng: np.random.Generator) -> tuple[str, Scene]:
    ground = choose(rng, [g for g in GROUNDS if g != scene.ground])
    text = "[draw it again {ground}|the same, but {ground}|now {ground}]"
    return say(rng, text, ground=ground_phrase(ground, rng)), replace(scene, ground=ground)


CHANGES: tuple[Change, ...] = (
    _again, _recolor, _recolor, _retexture, _dress, _write, _move, _move, _resize, _remove, _only, _only, _ground,
)  # fmt: skip
