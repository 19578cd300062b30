"""The detector: what goes in and out, that it learns, and how images are scored with it."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toyworld.detector import MAP, OUTPUTS, PIXELS, TRAITS, Detection, Detector, DetectorNet, split
from toyworld.draw import boxes, draw
from toyworld.sampling import random_scene, scene_rng
from toyworld.scene import SIZES, Attributes, Scene, SceneObject
from toyworld.score import SceneScore, match, pair, stated
from toyworld.train_detector import SceneBatches, evaluate, loss, paired, save, spoil, train

scenes = st.integers(0, 2**32).map(lambda seed: random_scene(np.random.default_rng(seed)))


def truth(scene: Scene) -> list[Detection]:
    """What a detector without fault would see."""
    found = []
    for obj, box in zip(scene.objects, boxes(scene, 1000), strict=True):
        found.append(Detection(obj.attributes, obj.cell, obj.size, tuple(v / 1000 for v in box), 1.0))
    return found


class TestScore:
    @settings(max_examples=60)
    @given(scenes, st.randoms(use_true_random=False))
    def test_what_was_asked_for_is_perfect(self, scene: Scene, order: random.Random) -> None:
        seen = truth(scene)
        order.shuffle(seen)
        score = match(scene, seen)
        assert score.perfect == score.images == 1
        assert score.extras == 0
        rates = score.rates()
        assert {rates.pop("extras")} == {0.0}
        assert set(rates.values()) == {1.0}

    @settings(max_examples=40)
    @given(scenes, scenes)
    def test_counts_keep_within_their_totals(self, asked: Scene, drawn: Scene) -> None:
        score = match(asked, truth(drawn))
        assert 0 <= score.found_kind_color <= score.found_kind <= score.requested == len(asked.objects)
        assert score.found_kind + score.extras == len(drawn.objects)
        assert score.relations_right <= score.relations == len(stated(asked))
        assert score.glyphs_read <= score.glyphs
        both = score + match(drawn, truth(drawn))
        assert both.images == 2
        assert both.requested == len(asked.objects) + len(drawn.objects)
        assert all(0 <= rate <= 1 for name, rate in both.rates().items() if name != "extras")

    def test_a_seen_thing_stands_for_one_only(self) -> None:
        foxes = Scene(tuple(SceneObject(Attributes("fox", color), cell) for cell, color in enumerate(("red", "blue"))))
        score = match(foxes, truth(foxes)[1:])
        assert (score.found_kind, score.found_kind_color, score.relations_right, score.perfect) == (1, 1, 0, 0)
        assert pair(foxes, truth(foxes)[1:]) == {1: 0}

    @pytest.mark.parametrize(
        ("trait", "value", "count"),
        [("texture", "dotted", "right_texture"), ("part", "hat", "right_part"), ("glyph", "B", "right_glyph")],
    )
    def test_a_wrong_trait_costs_its_own_count(self, trait: str, value: str, count: str) -> None:
        scene = Scene((SceneObject(Attributes("fox", "red", glyph="A"), 4),))
        score = match(scene, truth(Scene((scene.objects[0].with_attributes(**{trait: value}),))))
        right = {"right_texture": 1, "right_part": 1, "right_glyph": 1, "found_kind_color": 1}
        assert {name: getattr(score, name) for name in right} == right | {count: 0}
        assert score.glyphs_read == (trait != "glyph")

    def test_relations_are_looked_for_where_things_are(self) -> None:
        scene = Scene((SceneObject(Attributes("fox", "red"), 3), SceneObject(Attributes("cat", "red"), 5)))
        turned = Scene((replace(scene.objects[0], cell=5), replace(scene.objects[1], cell=3)))
        assert match(scene, truth(turned)).relations_right == 0
        assert match(scene, truth(turned), [(0, "right of", 1)]).relations_right == 1
        assert match(scene, truth(turned), [(0, "right of", 1), (0, "above", 1)]).relations == 2
        with pytest.raises(ValueError, match="unknown relation 'near'"):
            match(scene, truth(scene), [(0, "near", 1)])

    def test_inside_and_behind_are_told_apart(self) -> None:
        around = SceneObject(Attributes("ring", "red"), 4)
        within = SceneObject(Attributes("cat", "red"), 4, "small", place="inside", host=0)
        back = SceneObject(Attributes("cat", "red"), 4, "small", (0.35, -0.3), "behind", 0)
        assert match(Scene((around, within)), truth(Scene((around, back)))).relations_right == 0
        assert match(Scene((around, back)), truth(Scene((around, within)))).relations_right == 0
        assert match(Scene((around, back)), truth(Scene((around, back)))).relations_right == 1

    def test_looks_that_no_text_tells_are_kept_as_a_whole_or_in_part(self) -> None:
        scene = Scene((SceneObject(Attributes("fox", "red", "striped"), 3), SceneObject(Attributes("cat", "blue"), 5)))
        other = Scene((scene.objects[0].with_attributes(texture="dotted"), scene.objects[1]))
        score = match(scene, truth(other), (), unsaid=[0])
        assert (score.unsaid, score.kept, score.kept_kind, score.kept_color, score.kept_texture) == (1, 0, 1, 1, 0)
        assert (score.relations, score.perfect) == (0, 1)
        assert match(scene, truth(other), (), unsaid=[1]).kept == 1
        gone = match(scene, truth(scene)[1:], (), unsaid=[0, 1]).rates()
        assert (gone["kept"], gone["kept_kind"], gone["kept_glyph"]) == (0.5, 0.5, 0.5)
        assert "kept" not in match(scene, truth(scene), ()).rates()

    def test_nothing_asked_for_has_no_rates(self) -> None:
        assert SceneScore().rates() == {}


class TestNet:
    def test_shapes(self) -> None:
        outputs = DetectorNet()(torch.rand(2, 3, PIXELS, PIXELS))
        assert outputs.shape == (2, len(SIZES), OUTPUTS, MAP, MAP)
        centers, shifts, sides, traits = split(outputs)
        assert centers.shape == (2, 2, MAP, MAP)
        assert shifts.shape == sides.shape == (2, 2, 2, MAP, MAP)
        assert {name: value.shape[2] for name, value in traits.items()} == {n: len(v) for n, v in TRAITS.items()}

    @settings(max_examples=10)
    @given(scenes)
    def test_outputs_that_say_the_truth_are_read_as_such(self, scene: Scene) -> None:
        outputs = torch.full((1, len(SIZES), OUTPUTS, MAP, MAP), -9.0)
        centers, shifts, sides, traits = split(outputs)
        for one in truth(scene):
            x, y = (v * MAP for v in one.center)
            at = (0, SIZES.index(one.size), slice(None), int(y), int(x))
            centers[0, SIZES.index(one.size), int(y), int(x)] = 5.0
            shifts[at] = torch.tensor([x % 1, y % 1])
            sides[at] = torch.tensor([one.box[2] - one.box[0], one.box[3] - one.box[1]])
            for name, values in TRAITS.items():
                traits[name][at][values.index(getattr(one.attributes, name))] = 1.0
        (seen,) = Detector(DetectorNet()).objects(outputs)
        assert match(scene, seen).perfect == 1
        assert [b.attributes for _, b in sorted(paired(scene, seen), key=lambda p: scene.objects.index(p[0]))] == [
            obj.attributes for obj in scene.objects
        ]
        boxes_of = {one.attributes: one.box for one in seen}
        for one in truth(scene):
            assert boxes_of[one.attributes] == pytest.approx(one.box, abs=1e-4)

    def test_what_is_found_as_small_and_as_big_is_one_thing(self) -> None:
        outputs = torch.full((1, len(SIZES), OUTPUTS, MAP, MAP), -9.0)
        centers, _, _, traits = split(outputs)
        centers[0, 0, 5, 5], centers[0, 1, 5, 5] = 2.0, 3.0
        detector = Detector(DetectorNet())
        assert [one.size for one in detector.objects(outputs)[0]] == ["big"]
        traits["color"][0, 0, 3, 5, 5] = 1.0
        assert [one.size for one in detector.objects(outputs)[0]] == ["big", "small"]

    def test_images_of_any_size_and_mode_are_read(self, tmp_path: Path) -> None:
        save(DetectorNet(), tmp_path / "detector.safetensors")
        detector = Detector.load(tmp_path / "detector.safetensors")
        detector.threshold = 0.0
        images = [draw(random_scene(scene_rng(0, "val", i)), 256) for i in range(3)]
        images[1] = images[1].convert("L").resize((64, 100), PIL.Image.Resampling.BILINEAR)
        read = detector.detect(images, batch=2)
        assert len(read) == 3
        assert all(seen for seen in read)
        assert all(a.score >= b.score for seen in read for a, b in pairwise(seen))
        assert all(0 <= one.cell < 9 and one.size in SIZES for seen in read for one in seen)

    def test_weights_survive_the_file_in_half_precision(self, tmp_path: Path) -> None:
        net, path = DetectorNet(), tmp_path / "new" / "detector.safetensors"
        net(torch.rand(4, 3, PIXELS, PIXELS))  # running means move
        save(net, path)
        assert path.stat().st_size < 2e6
        assert [file.name for file in path.parent.iterdir()] == ["detector.safetensors"]
        again, images = Detector.load(path).net, torch.rand(2, 3, PIXELS, PIXELS)
        with torch.no_grad():
            torch.testing.assert_close(again(images), net.eval()(images), atol=2e-2, rtol=1e-2)

    def test_missing_weights_say_how_to_make_them(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="train_detector --output"):
            Detector.load(tmp_path / "no.safetensors")


class TestTraining:
    def test_batches_are_repeatable_and_describe_their_scenes(self) -> None:
        batches = SceneBatches(3, 4, seed=5)
        images, geometry, traits = batches[2]
        for first, second in zip((images, geometry, traits), batches[2], strict=True):
            assert torch.equal(first, second)
        assert not torch.equal(images, batches[1][0])
        assert images.shape == (4, 3, PIXELS, PIXELS)
        real = traits[..., 0] >= 0
        assert real.any(1).all()
        assert (geometry[real] > 0).all()
        assert (geometry[~real] == 0).all()

    def test_spoiling_keeps_the_image_recognisable(self) -> None:
        images = SceneBatches(1, 16, seed=0)[0][0].float() / 255
        spoiled = spoil(images, torch.Generator().manual_seed(0))
        assert spoiled.shape == images.shape
        assert 0 <= spoiled.min() <= spoiled.max() <= 1
        assert 0.001 < (spoiled - images).abs().mean() < 0.1

    def test_the_loss_of_true_outputs_is_small(self) -> None:
        _, geometry, traits = SceneBatches(1, 4, seed=0)[0]
        outputs = torch.full((4, len(SIZES), OUTPUTS, MAP, MAP), -9.0)
        centers, shifts, sides, logits = split(outputs)
        for image, number in (traits[..., 0] >= 0).nonzero().tolist():
            x, y, width, height = geometry[image, number].tolist()
            size, *values = traits[image, number].tolist()
            at = (image, size, slice(None), int(y * MAP), int(x * MAP))
            centers[image, size, int(y * MAP), int(x * MAP)] = 9.0
            shifts[at] = torch.tensor([x * MAP % 1, y * MAP % 1])
            sides[at] = torch.tensor([width, height])
            for trait, value in zip(logits.values(), values, strict=True):
                trait[at][value] = 9.0
        assert all(float(value) < 0.01 for value in loss(outputs, geometry, traits).values())
        assert sum(loss(torch.zeros_like(outputs), geometry, traits).values()) > 5

    def test_a_few_steps_lower_the_loss(self) -> None:
        totals: list[float] = []
        net = train(12, 8, "cpu", lambda step, losses: totals.append(float(sum(losses.values()))))
        assert len(totals) == 12
        assert np.mean(totals[-4:]) < 0.8 * np.mean(totals[:4])
        found = evaluate(Detector(net, threshold=0.6), scenes=4)
        assert found["scenes"] == 4
        assert all(0 <= value <= 1 for name, value in found.items() if name not in ("scenes", "objects"))


class TestShipped:
    def test_it_reads_what_can_be_seen(self) -> None:
        found = evaluate(Detector.load(), scenes=150, seed=5, part="val")
        assert found["kind_color_cell"] >= 0.99
        assert min(found["glyph_read"], found["recall"], found["precision"]) >= 0.98
        assert found["kind_color_behind"] <= found["kind_color_cell"]
