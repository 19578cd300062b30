"""Scenes by chance: repeatable, apart by split, never ambiguous."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_interleaved.toyworld.draw import visible
from mm_interleaved.toyworld.kinds import KINDS
from mm_interleaved.toyworld.sampling import LEAST_SEEN, SPLITS, Split, random_look, random_scene, scene_rng, split_of
from mm_interleaved.toyworld.scene import COLORS, GROUNDS, Look, Scene, Thing


def many(number: int, seed: int = 0, split: Split = "train") -> list[Scene]:
    return [random_scene(scene_rng(seed, split, i), split=split) for i in range(number)]


def test_the_same_numbers_give_the_same_scene() -> None:
    assert many(50) == many(50)
    assert many(50) != many(50, seed=1)
    assert len(set(many(300))) == 300


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_belong_to_their_split(split: Split) -> None:
    assert {split_of(scene) for scene in many(200, split=split)} == {split}


def test_splits_have_their_shares() -> None:
    count = Counter(split_of(random_scene(np.random.default_rng(i))) for i in range(4000))
    assert 0.87 < count["train"] / 4000 < 0.93
    assert 0.035 < count["val"] / 4000 < 0.065
    assert 0.035 < count["test"] / 4000 < 0.065


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.sampled_from(GROUNDS), st.integers(0, 9), st.randoms(use_true_random=False))
def test_a_split_is_a_matter_of_content(seed: int, ground: str, drawing: int, random) -> None:
    scene = random_scene(np.random.default_rng(seed))
    order = list(range(len(scene.things)))
    random.shuffle(order)
    moved = tuple(
        replace(
            scene.things[i],
            host=None if scene.things[i].host is None else order.index(scene.things[i].host),
            offset=(0.1, 0.0),
            name="Mila",
        )
        for i in order
    )
    assert split_of(Scene(moved, ground, drawing)) == split_of(scene)


def test_splits_stay_what_they_were() -> None:
    """Data sets that were written once must not change sides: these are facts of the format, not of the code."""
    foxes = [Scene((Thing(Look("fox", color), cell),)) for color in COLORS for cell in range(9)]
    held_out = {i: split_of(scene) for i, scene in enumerate(foxes) if split_of(scene) != "train"}
    assert held_out == {7: "test", 20: "val", 23: "val", 35: "val"}


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from([(1, 1), (1, 5), (2, 5), (6, 9)]))
def test_scenes_are_as_promised(seed: int, things: tuple[int, int]) -> None:
    scene = random_scene(np.random.default_rng(seed), things=things)
    assert things[0] <= len(scene.things) <= things[1]
    cells = [thing.cell for thing in scene.things if thing.place == "cell"]
    assert len(set(cells)) == len(cells)
    assert len({(thing.look.kind, thing.look.color) for thing in scene.things}) == len(scene.things)
    assert all(not thing.look.glyph for thing in scene.things if thing.size == "small")
    for thing, share in zip(scene.things, visible(scene), strict=True):
        if thing.place == "cell":
            assert thing.host is None
            continue
        host = scene.things[thing.host]
        assert thing.cell == host.cell
        assert (thing.size, host.size) == ("small", "big")
        assert KINDS[host.look.kind].hollow == (thing.place == "inside")
        assert share >= LEAST_SEEN
        assert share > 0.98 if thing.place == "inside" else share < 0.9


def test_everything_turns_up() -> None:
    found = many(1500)
    things = [thing for scene in found for thing in scene.things]
    assert {thing.look.kind for thing in things} == set(KINDS)
    assert {thing.place for thing in things} == {"cell", "inside", "behind"}
    assert {scene.ground for scene in found} == set(GROUNDS)
    places = Counter(thing.place for thing in things)
    assert min(places["inside"], places["behind"]) > 0.03 * len(found)
    big = [thing for thing in things if thing.size == "big"]
    assert 0.15 < sum(bool(thing.look.glyph) for thing in big) / len(big) < 0.35
    assert 0.15 < sum(thing.look.part != "none" for thing in things) / len(things) < 0.25


def test_looks_keep_to_what_is_asked() -> None:
    rng = np.random.default_rng(0)
    looks = [random_look(rng, kinds=["fox"], textured=0, with_part=1, with_glyph=0) for _ in range(30)]
    assert {look.kind for look in looks} == {"fox"}
    assert {look.texture for look in looks} == {"plain"}
    assert "none" not in {look.part for look in looks}
    assert {look.glyph for look in looks} == {""}


@pytest.mark.parametrize("things", [(0, 3), (4, 2), (1, 10)])
def test_a_number_of_things_that_cannot_be_is_refused(things: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="within 1 to 9"):
        random_scene(np.random.default_rng(0), things=things)
