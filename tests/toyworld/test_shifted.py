"""The shifted world shares nothing with the first one, and is written, read and scored by the same tasks."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import PIL.Image
import pytest

from mm_interleaved.evaluation import MetricConfig
from mm_interleaved.evaluation.scoring import ScoringInputs
from mm_interleaved.metrics import MetricResult
from mm_interleaved.tasks import TASKS as TASK_TYPES
from mm_interleaved.tasks import TaskConfig, make_task
from mm_interleaved.tasks.facts import find_facts
from toyworld import kinds, scene
from toyworld.draw import LABELS
from toyworld.facts import drawn_scenes, shown_scenes
from toyworld.language.phrases import CELL_NAMES
from toyworld.metrics import scene_captions, scene_images
from toyworld.sampling import SPLITS, scene_rng
from toyworld.shifted import drawing, language, reading, world
from toyworld.shifted.stories import story
from toyworld.worlds import WORLDS
from toyworld.writers import WriteError, write_dataset
from toyworld.writers.base import Job

SHIFTED = WORLDS["shifted"]
TASKS = {  # format, folder of images, phases of train and val
    "coco_karpathy": ("coco", "", "train", "val"), "vqav2": ("vqav2", "", "train", "val"),
    "refcoco": ("refcoco", "train2014", "train", "val"), "coco": ("coco", "", "train", "val"),
    "ade20k": ("ade20k", "", "training", "validation"), "vist": ("vist", "images", "train", "val"),
    "visdial": ("visdial", "", "train", "val"),
}  # fmt: skip


def test_nothing_is_shared_with_the_first_world() -> None:
    assert not set(world.KINDS) & set(kinds.KINDS)
    assert not set(world.COLORS) & set(scene.COLORS)
    assert not set(world.GROUNDS) & set(scene.GROUNDS)
    assert not set(world.PLACES) & set(CELL_NAMES)
    assert not set(drawing.LABELS.values()) & set(LABELS.values())


def test_splits_share_no_arrangement() -> None:
    found = {}
    for split in SPLITS:
        scenes = [SHIFTED.scene(scene_rng(0, split, i), split) for i in range(60)]
        found[split] = {
            tuple(sorted((o.attributes.kind, o.attributes.color, o.cell) for o in s.objects)) for s in scenes
        }
    assert not found["train"] & found["val"]
    assert not found["train"] & found["test"]
    assert not found["val"] & found["test"]


@pytest.mark.parametrize("size", [112, 256])
def test_everything_drawn_is_found(size: int) -> None:
    for index in range(40):
        shown = SHIFTED.scene(scene_rng(1, "val", index), "val")
        image = SHIFTED.draw(shown, size)
        assert image.tobytes() == SHIFTED.draw(shown, size).tobytes()
        scores = reading.score_image(reading.read_image(image), shown)
        assert scores.pop("extras") == (0, len(shown.objects))
        assert set(scores.values()) == {(len(shown.objects),) * 2}
        labels, found = SHIFTED.label_map(shown, size), SHIFTED.boxes(shown, size)
        for obj, (x0, y0, x1, y1) in zip(shown.objects, found, strict=True):
            mine = labels == drawing.LABELS[obj.attributes.kind]
            assert mine[y0:y1, x0:x1].sum() == mine.sum() > 0


def test_other_images_and_texts_score_less() -> None:
    shown, other = (SHIFTED.scene(scene_rng(0, "val", index), "val") for index in (0, 5))
    assert reading.score_image(reading.read_image(SHIFTED.draw(other, 128)), shown)["found_kind_color"][0] == 0
    assert reading.read_image(PIL.Image.new("RGB", (128, 128), "white")) == []
    rng = scene_rng(0, "val", 0)
    assert reading.score_text(SHIFTED.caption(shown, rng).text, shown)["objects_f1"] == (2 * len(shown.objects),) * 2
    assert reading.score_text("A red fox.", shown)["objects_f1"] == (0, len(shown.objects))


def test_a_question_has_one_answer_and_a_dialogue_100_candidates() -> None:
    for index in range(20):
        rng = scene_rng(2, "train", index)
        shown = SHIFTED.scene(rng, "train")
        asked = SHIFTED.questions(shown, rng, 4)
        assert len({q.question for q in asked}) == len(asked)
        assert {q.answer for q in asked} <= set(language.ANSWERS)
        for turn in SHIFTED.dialogue(shown, rng).rounds:
            assert len(set(turn.candidates)) == 100
            assert turn.candidates[turn.index] == turn.answer


def test_only_the_first_text_of_a_story_says_what_its_hero_is() -> None:
    for index in range(20):
        told = story(scene_rng(0, "train", index), 5, "train")
        (name,) = told.characters
        hero = told.frames[0].scene.objects[0].attributes.kind
        assert hero in told.frames[0].text
        assert all(name in frame.text for frame in told.frames)
        assert not any(re.search(rf"\b{hero}\b", frame.text) for frame in told.frames[1:])
        assert all(one.scene != two.scene for one, two in pairwise(told.frames))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    folders: dict[tuple[str, str], Path] = {}

    def write(form: str, split: str) -> Path:
        if (form, split) not in folders:
            folder = tmp_path_factory.mktemp("shifted") / form
            write_dataset(form, folder, Job(4, split, 0, 64, "shifted"))  # type: ignore[arg-type]
            folders[form, split] = folder
        return folders[form, split]

    return write


@pytest.mark.parametrize("name", TASKS)
def test_the_tasks_read_it(written, name: str) -> None:
    form, images, *phases = TASKS[name]
    for split, phase in zip(("train", "val"), phases, strict=True):
        if phase not in TASK_TYPES[name].phases:
            continue
        folder = written(form, split)
        task = make_task(TaskConfig(name, phase=phase, images=str(folder / images), annotations=str(folder)))
        assert len(list(task.samples())) >= 4
        facts = find_facts(task)
        assert facts is not None
        assert facts.origin == "the shifted toy world"


def given(written, name: str, answer) -> ScoringInputs:
    """The inputs of the metrics of a task whose predictions are `answer` of its samples."""
    form, images, _, phase = TASKS[name]
    folder = written(form, "val")
    task = make_task(TaskConfig(name, phase=phase, images=str(folder / images), annotations=str(folder)))
    samples, facts = list(task.samples()), find_facts(task)
    return ScoringInputs(task, samples, answer(samples, facts), folder, MetricConfig(), "cpu", facts)


def test_true_images_and_texts_have_full_scores(written, tmp_path: Path) -> None:
    def draw(samples, facts):
        scenes = drawn_scenes(samples, facts)
        records = []
        for sample in samples:
            slots = sorted(slot for key, slot in scenes if key == sample.id)
            for slot in slots:
                asked = scenes[sample.id, slot]
                SHIFTED.draw(getattr(asked, "scene", asked), 128).save(tmp_path / f"{sample.id}_{slot}.png")
            records.append({"id": sample.id, "images": [str(tmp_path / f"{sample.id}_{slot}.png") for slot in slots]})
        return records

    def tell(samples, facts):
        scenes = shown_scenes(samples, facts)
        return [{"id": i, "prediction": SHIFTED.caption(s, scene_rng(0, "val", 0)).text} for i, s in scenes.items()]

    results: list[tuple[MetricResult, str]] = [
        *((scene_images(given(written, name, draw)), "found_kind_color") for name in ("coco", "ade20k", "vist")),
        (scene_captions(given(written, "coco_karpathy", tell)), "objects_f1"),
    ]
    for result, main in results:
        assert next(iter(result.values)) == main
        assert result.values[main] == 100.0


def test_what_it_is_not_written_as(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="the world 'shifted' is not written as 'gqa', but as coco"):
        write_dataset("gqa", tmp_path / "out", Job(1, "train", 0, 64, "shifted"))
    with pytest.raises(WriteError, match="there is no world 'other'; worlds are base, shifted"):
        write_dataset("coco", tmp_path / "out", Job(1, "train", 0, 64, "other"))
