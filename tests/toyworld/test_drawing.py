"""Images, boxes and label maps tell the same about a scene."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toyworld.draw import GROUND_LABELS, KIND_LABELS, LABELS, boxes, draw, label_map, owners, visible
from toyworld.kinds import GROUPS, KINDS
from toyworld.sampling import random_scene
from toyworld.scene import (
    COLORS,
    GLYPHS,
    GROUNDS,
    PARTS,
    SIZES,
    TEXTURES,
    Attributes,
    Scene,
    SceneObject,
)
from toyworld.sprites import ATLAS, sprite

SHADOW = 90  # no shadow changes a channel by more
scenes = st.integers(0, 2**32).map(lambda seed: random_scene(np.random.default_rng(seed)))


def pixels(scene: Scene, size: int = 128) -> np.ndarray:
    return np.asarray(draw(scene, size)).astype(int)


def one(attributes: Attributes, size: str = "big", ground: str = "snow") -> Scene:
    return Scene((SceneObject(attributes, 4, size),), ground)


@settings(max_examples=20)
@given(scenes)
def test_the_same_scene_is_the_same_image(scene: Scene) -> None:
    first = draw(scene, 128)
    sprite.cache_clear()
    copy = replace(scene, objects=tuple(replace(obj) for obj in scene.objects))
    assert first.mode == "RGB"
    assert first.size == (128, 128)
    assert draw(copy, 128).tobytes() == first.tobytes()


def test_the_seed_changes_the_ground_and_nothing_else() -> None:
    for ground in GROUNDS:
        scene = Scene((SceneObject(Attributes("fox", "red"), 4),), ground, 1)
        apart = np.abs(pixels(scene) - pixels(replace(scene, seed=2))).sum(-1)
        assert apart.any(), ground
        assert apart[owners(scene, 128) == 0].mean() < 5  # of 765; the rim lets a little through


@settings(max_examples=25)
@given(scenes, st.sampled_from([128, 192]))
def test_boxes_enclose_what_a_thing_changes(scene: Scene, size: int) -> None:
    whole = pixels(scene, size)
    found = boxes(scene, size)
    last = len(scene.objects) - 1
    rest = replace(scene, objects=scene.objects[:-1])
    changed = np.abs(pixels(rest, size) - whole).max(-1) > SHADOW
    x0, y0, x1, y1 = found[last]
    assert 0 <= x0 < x1 <= size
    assert 0 <= y0 < y1 <= size
    outside = changed.copy()
    outside[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = False  # a pixel's breadth of anti-aliasing
    assert not outside.any()


@pytest.mark.parametrize("name", KINDS)
def test_a_box_is_tight(name: str) -> None:
    scene = one(Attributes(name, "blue"), ground="room")
    (box,) = boxes(scene, 128)
    rows, columns = np.nonzero(owners(scene, 128) == 0)
    assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    longest = max(box[2] - box[0], box[3] - box[1])
    assert 0.85 * 0.95 * 128 / 3 <= longest <= 128 / 3 + 1


@settings(max_examples=25)
@given(scenes)
def test_label_maps_show_what_is_seen(scene: Scene) -> None:
    labels, who, shares = label_map(scene, 96), owners(scene, 96), visible(scene, 96)
    assert labels.dtype == np.uint8
    assert labels.shape == (96, 96)
    assert (labels[who == -1] == GROUND_LABELS[scene.ground]).all()
    for i, (obj, box) in enumerate(zip(scene.objects, boxes(scene, 96), strict=True)):
        assert (labels[who == i] == KIND_LABELS[obj.attributes.kind]).all()
        rows, columns = np.nonzero(who == i)
        assert box[0] <= columns.min() <= columns.max() < box[2]
        assert box[1] <= rows.min() <= rows.max() < box[3]
        assert 0 < shares[i] <= 1
    kinds = {KIND_LABELS[obj.attributes.kind] for obj in scene.objects}
    assert set(np.unique(labels)) == kinds | {GROUND_LABELS[scene.ground]}


def test_labels_are_150_classes_with_room_for_unlabelled() -> None:
    assert sorted(LABELS.values()) == list(range(1, len(LABELS) + 1))
    assert len(LABELS) <= 150
    assert 60 <= len(KINDS) <= 100
    assert {kind.group for kind in KINDS.values()} == set(GROUPS)
    assert len({kind.emoji for kind in KINDS.values() if kind.emoji}) == sum(bool(k.emoji) for k in KINDS.values())


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_drawn(name: str, size: int) -> None:
    for scale in SIZES:
        scene = one(Attributes(name, "green", "dotted", "hat", "A"), scale)
        empty = pixels(Scene((), scene.ground), size)
        x0, y0, x1, y1 = boxes(scene, size)[0]
        changed = np.abs(pixels(scene, size) - empty).max(-1) > 25
        assert changed[y0:y1, x0:x1].mean() > 0.3


def test_kinds_differ_in_their_images() -> None:
    drawn = {name: pixels(one(Attributes(name, "purple")), 64)[20:44, 20:44].ravel() for name in KINDS}
    names = list(drawn)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert np.abs(drawn[a] - drawn[b]).mean() > 8, (a, b)


def mean_color(attributes: Attributes) -> np.ndarray:
    """Of an object as large as in an image of 128 px, without its pale rim."""
    image = sprite(attributes, 40)
    inner = image.color[(image.alpha[..., 0] > 0.9) & (image.color.min(-1) < 225)]
    return inner.mean(0).astype(float)


@pytest.mark.parametrize("name", KINDS)
def test_colors_are_told_apart(name: str) -> None:
    means = [mean_color(Attributes(name, color)) for color in COLORS]
    apart = [np.linalg.norm(a - b) for i, a in enumerate(means) for b in means[i + 1 :]]
    assert min(apart) > 35


@pytest.mark.parametrize("color", COLORS)
def test_the_nearest_color_is_the_right_one(color: str) -> None:
    centers = {c: np.mean([mean_color(Attributes(name, c)) for name in KINDS], axis=0) for c in COLORS}
    for name in KINDS:
        mean = mean_color(Attributes(name, color))
        assert min(COLORS, key=lambda c: np.linalg.norm(mean - centers[c])) == color, name


@pytest.mark.parametrize(("trait", "values"), [("texture", TEXTURES), ("part", PARTS), ("glyph", ("", *GLYPHS))])
def test_every_value_of_a_trait_shows(trait: str, values: tuple[str, ...]) -> None:
    for color in COLORS:
        drawn = [pixels(one(replace(Attributes("bear", color), **{trait: value}))) for value in values]
        for i, a in enumerate(drawn):
            for b in drawn[i + 1 :]:
                assert (np.abs(a - b).max(-1) > 60).sum() > 8


def test_what_is_behind_is_drawn_first_and_what_is_inside_last() -> None:
    back = SceneObject(Attributes("fox", "red"), 4, "small", (0.3, -0.2), "behind", 1)
    front = SceneObject(Attributes("square", "blue"), 4)
    within = SceneObject(Attributes("cat", "red"), 4, "small", (0.0, 0.0), "inside", 1)
    assert visible(Scene((back, front)))[0] < 0.7
    assert visible(Scene((back, front)))[1] == 1
    assert visible(Scene((within, front)))[0] == 1


@pytest.mark.parametrize("host", [None, 2, -1, 0])
def test_a_host_that_cannot_be_is_named(host: int | None) -> None:
    objects = (
        SceneObject(Attributes("fox", "red"), 4, "small", place="inside", host=host),
        SceneObject(Attributes("ring", "red"), 4),
    )
    with pytest.raises(ValueError, match=r"object 0 is inside|hosts of each other"):
        draw(Scene(objects), 64)


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (one(Attributes("dragon", "red")), "unknown kind 'dragon'; there are: circle, "),
        (one(Attributes("fox", "teal")), "unknown color 'teal'"),
        (one(Attributes("fox", "red", "furry")), "unknown texture 'furry'"),
        (one(Attributes("fox", "red", part="scarf")), "unknown part 'scarf'"),
        (one(Attributes("fox", "red", glyph="O")), "unknown glyph 'O'"),
        (one(Attributes("fox", "red"), "huge"), "unknown size 'huge'; there are: small, big"),
        (one(Attributes("fox", "red"), ground="moon"), "unknown ground 'moon'"),
    ],
)
def test_what_there_is_not_is_refused(scene: Scene, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(scene, 64)
    with pytest.raises(ValueError, match="at least 36"):
        draw(one(Attributes("fox", "red"), "small"), 32)


def test_the_atlas_holds_every_emoji_and_is_small() -> None:
    with PIL.Image.open(ATLAS) as image:
        assert image.text["kinds"].split() == [kind.name for kind in KINDS.values() if kind.emoji]
    assert ATLAS.stat().st_size < 1.2e6
    assert "SIL OPEN FONT LICENSE" in (ATLAS.parent / "OFL.txt").read_text()
