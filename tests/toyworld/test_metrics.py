"""The toy world's own scores behind the protocol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from toyworld.draw import draw
from toyworld.language import caption
from toyworld.metrics import SceneImages, caption_facts
from toyworld.sampling import random_scene
from toyworld.scene import Attributes, Scene, SceneObject
from toyworld.stories import Frame

SCENES = {seed: random_scene(np.random.default_rng(seed)) for seed in range(6)}


def test_drawn_scenes_are_read_well_and_blank_ones_not_at_all() -> None:
    drawn = SceneImages()({key: draw(scene, 128) for key, scene in SCENES.items()}, SCENES)
    assert drawn.values["found_kind_color"] > 80
    assert drawn.per_sample["found_kind_color"].keys() == SCENES.keys()
    blank = SceneImages()(dict.fromkeys(SCENES, PIL.Image.new("RGB", (128, 128))), SCENES)
    assert blank.values["found_kind"] == 0
    assert blank.per_sample["found_kind_color"] == dict.fromkeys(SCENES, 0)


def test_missing_weights_are_said(tmp_path: Path) -> None:
    result = SceneImages(tmp_path / "none.safetensors")({1: PIL.Image.new("RGB", (8, 8))}, {1: SCENES[1]})
    assert "no detector's weights" in result.skipped
    assert "train_detector" in result.fix


def test_captions_of_their_own_scenes_are_right() -> None:
    rng = np.random.default_rng(0)
    texts = {key: caption(scene, rng).text for key, scene in SCENES.items()}
    result = caption_facts(texts, SCENES)
    assert result.values["facts_right"] == 100
    assert result.values["objects_mentioned"] > 0
    assert result.values["facts_per_caption"] >= 1
    assert result.per_sample["facts_right"] == dict.fromkeys(SCENES, 100)


def test_facts_are_counted_over_all_captions() -> None:
    scene = Scene((SceneObject(Attributes("fox", "red"), 4),))
    result = caption_facts({1: "a red fox", 2: "a blue fox", 3: "nothing of note"}, dict.fromkeys((1, 2, 3), scene))
    assert result.per_sample["facts_right"] == pytest.approx({1: 100, 2: 50, 3: 0})
    assert result.values["facts_right"] == pytest.approx(75)
    assert result.values["objects_mentioned"] == pytest.approx(200 / 3)


def test_captions_that_state_nothing_are_neither_right_nor_wrong() -> None:
    result = caption_facts({1: "nothing of note"}, {1: SCENES[1]})
    assert "facts_right" not in result.values
    assert result.per_sample["facts_per_caption"] == {1: 0}


def test_of_a_story_what_no_text_tells_must_be_kept() -> None:
    red, blue = Scene((SceneObject(Attributes("fox", "red"), 4),)), Scene((SceneObject(Attributes("fox", "blue"), 4),))
    frames = {1: Frame("Mila is still here.", red, (0,)), 2: Frame("the fox is red.", red, ())}
    result = SceneImages()({1: draw(blue, 128), 2: draw(red, 128)}, frames)
    assert result.values["kept"] == result.values["kept_color"] == 0
    assert result.values["kept_kind"] == 100
    assert result.values["found_kind_color"] == 50
    assert "relations_right" not in result.values
    assert result.weights["kept_kind"] == {1: 1, 2: 0}


def test_values_are_ratios_of_sums() -> None:
    result = SceneImages()({key: draw(scene, 128) for key, scene in SCENES.items()}, SCENES)
    assert next(iter(result.values)) == "found_kind_color"
    assert result.per_sample.keys() == result.weights.keys() == result.values.keys()
    for name, scores in result.per_sample.items():
        weights = result.weights[name]
        right = sum(score * weights[key] for key, score in scores.items())
        assert result.values[name] == pytest.approx(right / sum(weights.values()))
