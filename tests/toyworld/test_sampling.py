"""Scenes by chance: repeatable, apart by split, never ambiguous."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toyworld.draw import visible
from toyworld.kinds import KINDS
from toyworld.sampling import (
    LEAST_SEEN,
    SPLITS,
    Split,
    random_attributes,
    random_scene,
    scene_rng,
    split_of,
)
from toyworld.scene import COLORS, GROUNDS, Attributes, Scene, SceneObject


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
    order = list(range(len(scene.objects)))
    random.shuffle(order)
    moved = tuple(
        replace(
            scene.objects[i],
            host=None if scene.objects[i].host is None else order.index(scene.objects[i].host),
            offset=(0.1, 0.0),
            name="Mila",
        )
        for i in order
    )
    assert split_of(Scene(moved, ground, drawing)) == split_of(scene)


def test_splits_stay_what_they_were() -> None:
    """Data sets that were written once must not change sides: these are facts of the format, not of the code."""
    foxes = [Scene((SceneObject(Attributes("fox", color), cell),)) for color in COLORS for cell in range(9)]
    held_out = {i: split_of(scene) for i, scene in enumerate(foxes) if split_of(scene) != "train"}
    assert held_out == {7: "test", 20: "val", 23: "val", 35: "val"}


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from([(1, 1), (1, 5), (2, 5), (6, 9)]))
def test_scenes_are_as_promised(seed: int, objects: tuple[int, int]) -> None:
    scene = random_scene(np.random.default_rng(seed), objects=objects)
    assert objects[0] <= len(scene.objects) <= objects[1]
    cells = [obj.cell for obj in scene.objects if obj.place == "cell"]
    assert len(set(cells)) == len(cells)
    assert len({(obj.attributes.kind, obj.attributes.color) for obj in scene.objects}) == len(scene.objects)
    assert all(not obj.attributes.glyph for obj in scene.objects if obj.size == "small")
    for obj, share in zip(scene.objects, visible(scene), strict=True):
        if obj.place == "cell":
            assert obj.host is None
            continue
        host = scene.objects[obj.host]
        assert obj.cell == host.cell
        assert (obj.size, host.size) == ("small", "big")
        assert KINDS[host.attributes.kind].hollow == (obj.place == "inside")
        assert share >= LEAST_SEEN
        assert share > 0.98 if obj.place == "inside" else share < 0.9


def test_everything_turns_up() -> None:
    found = many(1500)
    objects = [obj for scene in found for obj in scene.objects]
    assert {obj.attributes.kind for obj in objects} == set(KINDS)
    assert {obj.place for obj in objects} == {"cell", "inside", "behind"}
    assert {scene.ground for scene in found} == set(GROUNDS)
    places = Counter(obj.place for obj in objects)
    assert min(places["inside"], places["behind"]) > 0.03 * len(found)
    big = [obj for obj in objects if obj.size == "big"]
    assert 0.15 < sum(bool(obj.attributes.glyph) for obj in big) / len(big) < 0.35
    assert 0.15 < sum(obj.attributes.part != "none" for obj in objects) / len(objects) < 0.25


def test_looks_keep_to_what_is_asked() -> None:
    rng = np.random.default_rng(0)
    looks = [random_attributes(rng, kinds=["fox"], textured=0, with_part=1, with_glyph=0) for _ in range(30)]
    assert {attributes.kind for attributes in looks} == {"fox"}
    assert {attributes.texture for attributes in looks} == {"plain"}
    assert "none" not in {attributes.part for attributes in looks}
    assert {attributes.glyph for attributes in looks} == {""}


@pytest.mark.parametrize("objects", [(0, 3), (4, 2), (1, 10)])
def test_a_number_of_things_that_cannot_be_is_refused(objects: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="within 1 to 9"):
        random_scene(np.random.default_rng(0), objects=objects)
