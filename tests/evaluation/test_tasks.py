"""Every task from its official files to its results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch

from mm_interleaved import MMInterleaved, MMInterleavedProcessor
from mm_interleaved.evaluation import EvaluationError, MetricConfig, TaskSuite, predict
from mm_interleaved.evaluation.predict import Predictor, effective_settings, plan_batches, sample_seed
from mm_interleaved.evaluation.scoring import METRICS
from mm_interleaved.io import InputError
from mm_interleaved.metrics.clip import CLIP
from mm_interleaved.tasks import TASKS, make_task
from toyworld.draw import draw
from toyworld.facts import drawn_scenes, find
from toyworld.metrics import SceneImages

from ..tasks.conftest import TOY_FILES
from .conftest import QUICK, MakeTask, Run, contents, figures, lines


@pytest.mark.parametrize("name", [name for name in TOY_FILES if name != "llava_conversations"])
def test_end_to_end(name: str, task: MakeTask, run: Run, tmp_path: Path) -> None:
    result = run(task(name)).tasks[name]
    records = lines(tmp_path / "out" / name / "predictions.jsonl")
    samples = list(make_task(task(name)).samples())
    assert [(r["index"], r["id"]) for r in records] == [(i, s.id) for i, s in enumerate(samples)]
    assert not result.failed
    assert not result.unreadable
    assert result.samples == result.evaluated == len(samples) == 4
    kind = TASKS[name]
    for record, sample in zip(records, samples, strict=True):
        if kind.makes == "text":
            assert record["prediction"] == kind.post(record["text"])
        elif kind.makes == "scores":
            assert len(record["scores"]) == len(record["lengths"]) == len(sample.options)
        else:
            assert len(record["images"]) == len(sample.reference) if isinstance(sample.reference, list) else 1
            for image in record["images"]:
                assert PIL.Image.open(tmp_path / "out" / name / image).size == (32, 32)
    assert result.origin == "the toy world"
    assert set(result.metrics) - {"scene_captions", "scene_images"} == set(kind.metrics)
    assert set(result.metrics) <= set(METRICS)
    for metric in result.metrics.values():
        assert "failed" not in metric
        assert metric["values"] or (metric["skipped"] and metric["fix"])
    table = (tmp_path / "out/results.md").read_text()
    assert f"| {name} |" in table
    assert figures(tmp_path / "out")[name]["evaluated"] == 4


def without_answers(name: str, phase: str, source: Path, folder: Path) -> str:
    """Write a phase as it is published, without answers. Returns the folder of its images."""
    folder.mkdir()
    old = {"vqav2": "val2014", "vizwiz_vqa": "val", "textvqa": "train_images", "nocaps": "images"}[name]
    new = {"vqav2": "test2015", "vizwiz_vqa": "test", "textvqa": "test_images", "nocaps": "images"}[name]
    (folder / new).mkdir()
    for image in (source / old).iterdir():
        (folder / new / image.name.replace(old, new)).symlink_to(image)
    if name == "vizwiz_vqa":
        records = json.loads((source / "val.json").read_text())
        data = [{"image": r["image"].replace("val", "test"), "question": r["question"]} for r in records]
        (folder / "test.json").write_text(json.dumps(data))
        return str(folder)
    files = {"vqav2": ("v2_OpenEnded_mscoco_val2014_questions.json", f"v2_OpenEnded_mscoco_{phase}2015_questions.json"),
             "textvqa": ("textvqa_val_questions.json", "textvqa_test_questions.json"),
             "nocaps": ("nocaps_val_4500_captions.json", "nocaps_test_image_info.json")}[name]  # fmt: skip
    data = json.loads((source / files[0]).read_text())
    data.pop("annotations", None)
    (folder / files[1]).write_text(json.dumps(data))
    return str(folder if name == "vqav2" else folder / new)


@pytest.mark.parametrize(("name", "phase", "keys"), [
    ("vqav2", "test-dev", ("question_id", "answer")), ("vqav2", "test", ("question_id", "answer")),
    ("textvqa", "test", ("question_id", "answer")), ("vizwiz_vqa", "test", ("image", "answer")),
    ("nocaps", "test", ("image_id", "caption")),
])  # fmt: skip
def test_phases_without_answers_give_a_submission(
    name: str, phase: str, keys: tuple[str, str], task: MakeTask, run: Run, tmp_path: Path
) -> None:
    """In the official form; the sample whose image is missing has an empty text, as none may be left out."""
    images = without_answers(name, phase, Path(str(task(name).annotations)), tmp_path / "blind")
    config = task(name, phase=phase, images=images, annotations=str(tmp_path / "blind"), limit=None)
    samples = list(make_task(config).samples())
    Path(str(samples[0].document.images[0].source)).unlink()
    result = run(config, max_unreadable=0.5).tasks[name]
    assert not result.failed
    assert 0 < result.evaluated < len(samples)
    for metric in result.metrics.values():
        assert metric["values"] == {}
        assert metric["skipped"] == f"the answers of phase '{phase}' are not published"
        assert str(tmp_path / "out" / name / "submission.json") in metric["fix"]
    written = json.loads((tmp_path / "out" / name / "submission.json").read_text())
    made = {r["id"]: r.get("prediction", "") for r in lines(tmp_path / "out" / name / "predictions.jsonl")}
    ids = [s.meta["image"] if name == "vizwiz_vqa" else int(s.id) for s in samples]
    assert written == [{keys[0]: key, keys[1]: made[s.id]} for key, s in zip(ids, samples, strict=True)]
    assert written[0][keys[1]] == ""
    assert any(entry[keys[1]] for entry in written)
    with pytest.raises(InputError, match="Use a phase that has answers"):
        list(make_task(config).documents())


@pytest.mark.parametrize(
    ("name", "images", "key"), [("docvqa", "", "questionId"), ("textcaps", "test_images", "image_id")]
)
def test_submissions_of_documents_and_texts(
    name: str, images: str, key: str, task: MakeTask, run: Run, tmp_path: Path
) -> None:
    config = task(name, phase="test", limit=2)
    config = replace(config, images=str(Path(str(config.annotations)) / images))
    assert not run(config).tasks[name].failed
    samples = list(make_task(config).samples())
    written = json.loads((tmp_path / "out" / name / "submission.json").read_text())
    assert [str(entry[key]) for entry in written] == [s.id for s in samples]
    assert all(len(entry) == 2 for entry in written)


STORIES = {"vist": {}, "pororo": {"protocol": "autoregressive"}, "flintstones": {"protocol": "last"}}


@pytest.mark.parametrize("name", STORIES)
def test_scenes_of_stories_are_those_of_their_images(name: str, task: MakeTask) -> None:
    """So true images are found right."""
    asked = make_task(task(name, options=STORIES[name]))
    samples = list(asked.samples())
    scenes = drawn_scenes(samples, find(asked))
    true = {(s.id, slot): image for s in samples for slot, image in enumerate(s.reference)}
    assert len(true) == 4 * (4 if STORIES[name].get("protocol") == "autoregressive" else 1)
    if name == "vist":
        for key, path in true.items():
            with PIL.Image.open(path) as image:
                assert image.tobytes() == draw(scenes[key].scene, image.width).tobytes()
    else:
        assert SceneImages()(true, scenes).values["found_kind_color"] > 80


def test_images_of_stories_are_scored(task: MakeTask, run: Run, tmp_path: Path) -> None:
    """Without CLIP; each sample has one score, whatever number of images it has."""
    named = {name: task(name, limit=2, options=options) for name, options in STORIES.items()}
    for name, result in run(*named.values()).tasks.items():
        metric = result.metrics["scene_images"]
        assert {"found_kind_color", "perfect"} <= metric["values"].keys()
        assert metric["intervals"].keys() == metric["values"].keys()
        assert all(low <= metric["values"][key] <= high for key, (low, high) in metric["intervals"].items())
        scored = lines(tmp_path / "out" / name / "scores.jsonl")
        assert [line["id"] for line in scored] == [s.id for s in make_task(named[name]).samples()]
        assert all(line["scores"]["scene_images"].keys() == metric["values"].keys() for line in scored)


def test_intervals_are_over_stories(task: MakeTask, run: Run) -> None:
    """Not over their images: of one story there is no other draw."""
    found = run(task("pororo", limit=1, options=STORIES["pororo"])).tasks["pororo"].metrics["scene_images"]
    assert found["intervals"]
    assert all(low == pytest.approx(high) for low, high in found["intervals"].values())


def test_conversations_for_training_are_refused(task: MakeTask, run: Run) -> None:
    found = run(task("llava_conversations"), task("gqa")).tasks
    assert "stands before a question" in found["llava_conversations"].failed
    assert found["gqa"].metrics  # the others go on


def test_batches_do_not_change_what_is_written(task: MakeTask, run: Run, tmp_path: Path) -> None:
    """One at a time, or ragged samples together."""
    asked = [task(n, generation={**QUICK, "do_sample": s, "num_beams": 1 if s else 3})
             for n, s in (("vqav2", False), ("vist_text", True))]  # fmt: skip
    run(*asked, folder="one", batch_size=1)
    run(*asked, folder="four", batch_size=4)
    one, four = contents(tmp_path / "one"), contents(tmp_path / "four")
    assert one == four
    assert len({r["text"] for r in lines(tmp_path / "one/vist_text/predictions.jsonl")}) > 1


def test_every_sample_has_its_own_seed(task: MakeTask, run: Run, tmp_path: Path) -> None:
    """Another seed draws other images, and equal prompts do not give equal images."""
    same = task("coco", prompt="a cat", limit=2)
    run(same, folder="a")
    run(same, folder="b", seed=1)
    a, b = (contents(tmp_path / name) for name in "ab")
    images = [content for name, content in (*a.items(), *b.items()) if name.endswith(".png")]
    assert len(set(images)) == 4
    assert sample_seed(0, "coco", "1") != sample_seed(0, "coco", "2") != sample_seed(0, "lncoco", "2")


def test_boxes_are_asked_of_the_whole_image(
    task: MakeTask, model: MMInterleaved, processor: MMInterleavedProcessor
) -> None:
    suite = TaskSuite([task("refcoco"), task("vqav2")])
    crops = [Predictor(model, processor, make_task(t), suite).processor.crop for t in suite.tasks]
    assert crops == ["squash", "center"]
    assert processor.crop == "center"


def test_only_some_tasks_run(task: MakeTask, run: Run) -> None:
    both = [task("gqa"), task("vqav2")]
    assert list(run(*both, only=["vqav2"]).tasks) == ["vqav2"]
    again = run(*both, only=["gqa"])
    assert list(again.tasks) == ["gqa", "vqav2"]  # what is known of others is kept
    assert list(again.speed) == ["gqa"]
    assert list(run(*both, only=["gqa"], seed=1, folder="other").tasks) == ["gqa"]


class TestEveryTaskIsWrittenAsSoonAsItIsScored:
    @pytest.fixture
    def stop(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        """Let a run be interrupted in the second batch of a task."""

        def before(name: str) -> None:
            real, batches = Predictor.predict, iter(range(9))

            def interrupted(self: Predictor, *given: object) -> object:
                if self.task.name == name and next(batches):
                    raise KeyboardInterrupt
                return real(self, *given)

            monkeypatch.setattr(Predictor, "predict", interrupted)

        return before

    def test_what_was_scored_before_an_interruption_is_there(
        self, task: MakeTask, run: Run, tmp_path: Path, stop: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And nothing else; then the same run goes on."""
        tasks = [task("llava_conversations"), task("gqa"), task("vqav2"), task("okvqa")]
        stop("vqav2")
        with pytest.raises(KeyboardInterrupt):
            run(*tasks)
        monkeypatch.undo()
        found = figures(tmp_path / "out")
        assert list(found) == ["llava_conversations", "gqa"]
        assert "stands before a question" in found["llava_conversations"]["failed"]
        assert found["gqa"]["metrics"]
        assert len(lines(tmp_path / "out/gqa/scores.jsonl")) == 4
        table = (tmp_path / "out/results.md").read_text()
        assert ("| gqa |" in table, "| vqav2 |" in table) == (True, False)
        again = run(*tasks)
        assert [again.speed[name]["samples"] for name in ("gqa", "vqav2", "okvqa")] == [0, 2, 4]
        written = json.loads((tmp_path / "out/results.json").read_text())["speed"]
        assert written["gqa"]["samples"] == 4  # of the run that predicted them
        run(*tasks, folder="whole")
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert list(figures(tmp_path / "out").items()) == list(figures(tmp_path / "whole").items())

    def test_earlier_results_stand_beside_them(
        self, task: MakeTask, run: Run, tmp_path: Path, stop: Callable[[str], None]
    ) -> None:
        """In the order of the settings, and until they are scored anew."""
        run(task("gqa"), task("vqav2", limit=2), task("okvqa"), only=["vqav2", "okvqa"])
        earlier = figures(tmp_path / "out")
        stop("vqav2")
        with pytest.raises(KeyboardInterrupt):
            run(task("gqa"), task("vqav2", limit=6), task("okvqa"))
        found = figures(tmp_path / "out")
        assert list(found) == ["gqa", "vqav2", "okvqa"]
        assert found["gqa"]["evaluated"] == 4
        assert {name: found[name] for name in earlier} == earlier


def test_a_task_can_run_twice_under_two_names(task: MakeTask, run: Run) -> None:
    found = run(task("pororo", name="current", options={"context": "current", "protocol": "last"}), task("pororo"))
    assert list(found.tasks) == ["current", "pororo"]


def test_samples_of_like_length_go_together(task: MakeTask) -> None:
    samples = list(make_task(task("visdial")).samples()) + list(make_task(task("vqav2")).samples())
    batches = plan_batches(samples, 3)
    assert sorted(index for batch in batches for index in batch) == list(range(8))
    assert [len(batch) for batch in batches] == [3, 3, 2]
    assert set(batches[0]) <= {4, 5, 6, 7}  # the questions are shorter than the dialogues


def test_without_clip_one_candidate_is_drawn(task: MakeTask, run: Run) -> None:
    eight = make_task(task("coco", generation={}))
    suite = TaskSuite([eight.config])
    assert effective_settings(eight, suite).image.num_candidates == 1
    suite = TaskSuite([eight.config], metrics=MetricConfig(clip="somewhere"))
    assert effective_settings(eight, suite).image.num_candidates == 8
    result = run(task("coco", limit=2)).tasks["coco"]
    assert "no CLIP model" in result.notes[0]


def test_clip_chooses_among_candidates(
    task: MakeTask, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two is the first of a run whose seeds are one higher."""
    asked: list[str] = []

    class Chooser(CLIP):
        def embed_texts(self, texts):
            return torch.zeros(len(texts), 1)

        def rerank(self, candidates, text):
            asked.append(text)
            return 1, [0.1, 0.7]

    monkeypatch.setattr(predict, "CLIP", Chooser)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/config.json").write_text("{}")
    two = task("coco", limit=2, generation={**QUICK, "num_candidates": 2})
    clip = MetricConfig(clip=str(tmp_path / "clip"))
    found = run(two, folder="chosen", metrics=clip).tasks["coco"]
    assert "no file named" in found.metrics["text_similarity"]["failed"]  # the others go on
    assert found.metrics["scene_images"]["values"]
    monkeypatch.setattr(predict, "sample_seed", lambda *names: sample_seed(*names) + 1)
    run(two, folder="next")
    records = lines(tmp_path / "chosen/coco/predictions.jsonl")
    assert [(r["candidate"], r["cosines"]) for r in records] == [(1, [0.1, 0.7])] * 2
    assert asked == [s.meta["caption"] for s in make_task(two).samples()]
    chosen, following = (contents(tmp_path / n) for n in ("chosen", "next"))
    for name in ("coco/images/000000_0.png", "coco/images/000001_0.png"):
        assert chosen[name] == following[name]


def test_a_folder_without_clip_is_said_before_anything_is_drawn(task: MakeTask, run: Run, tmp_path: Path) -> None:
    clip = MetricConfig(clip=str(tmp_path))
    with pytest.raises(InputError, match="is not a CLIP model"):
        run(task("coco"), metrics=clip)
    (tmp_path / "config.json").write_text("{}")
    assert "the CLIP model cannot be used" in run(task("coco"), metrics=clip).tasks["coco"].failed


def test_examples_before_the_question(task: MakeTask, run: Run, tmp_path: Path) -> None:
    template = "{image} Question: {question} Short answer: {answer}"
    shots = task("vqav2", shots=2, shot_phase="val", shot_template=template)
    documents = [s.document for s in make_task(shots).samples()]
    assert {len(d.images) for d in documents} == {3}
    assert run(shots).tasks["vqav2"].evaluated == 4


@pytest.mark.parametrize("name", ["seed", "num_return_sequences"])
def test_what_the_evaluation_decides_is_no_setting_of_a_task(name: str, task: MakeTask, run: Run) -> None:
    with pytest.raises((InputError, EvaluationError), match=f"'{name}' cannot be set for a task"):
        run(task("vqav2", generation={name: 3}))
