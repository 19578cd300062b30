"""Bad input: clear words, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mm_interleaved import MMInterleaved
from mm_interleaved.evaluation import EvaluationError
from mm_interleaved.io import InputError, OutputError
from toyworld.writers import write_dataset
from toyworld.writers.base import Job

from .conftest import MakeTask, Run, contents, lines


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """VQAv2's files in a folder that may be damaged."""
    write_dataset("vqav2", tmp_path / "vqav2", Job(5, "val", 0, 48))
    return tmp_path / "vqav2"


def own_task(task: MakeTask, own: Path, **settings: object):
    return task("vqav2", images=str(own), annotations=str(own), **{"limit": 6, **settings})


def test_a_missing_file_is_found_before_any_work(task: MakeTask, own: Path, run: Run, tmp_path: Path) -> None:
    (own / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(InputError, match=r"v2_mscoco_val2014_annotations\.json.*does not exist.*visualqa\.org"):
        run(task("gqa"), own_task(task, own))
    assert not (tmp_path / "out").exists()


def test_all_tasks_that_cannot_be_read_are_named(task: MakeTask, run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 tasks cannot be read; run the others with only=") as caught:
        run(task("gqa", annotations=str(tmp_path)), task("vist"), task("coco", annotations=str(tmp_path)))
    assert str(caught.value).count("does not exist") == 2


def test_another_layout_is_named_with_its_place(task: MakeTask, own: Path, run: Run) -> None:
    path = own / "v2_OpenEnded_mscoco_val2014_questions.json"
    data = json.loads(path.read_text())
    for question in data["questions"]:
        question["asked"] = question.pop("question")
    path.write_text(json.dumps(data))
    with pytest.raises(
        InputError, match=r"none of 6 records.*questions\.json, 'questions', record 0: 'question' is miss"
    ):
        run(own_task(task, own))


def test_a_damaged_record_further_on_fails_its_task_only(task: MakeTask, own: Path, run: Run, tmp_path: Path) -> None:
    """Here two samples have one id."""
    path = own / "v2_OpenEnded_mscoco_val2014_questions.json"
    data = json.loads(path.read_text())
    data["questions"][3]["question_id"] = data["questions"][0]["question_id"]
    path.write_text(json.dumps(data))
    found = run(own_task(task, own), task("gqa")).tasks
    assert f"id {data['questions'][0]['question_id']} stands in" in found["vqav2"].failed
    assert found["gqa"].metrics
    table = (tmp_path / "out/results.md").read_text()
    assert "| vqav2 | val | failed |" in table
    assert f"- vqav2: {found['vqav2'].failed}" in table


def test_odd_records_are_counted_and_named(task: MakeTask, own: Path, run: Run) -> None:
    """All of them, as far as `max_unreadable` allows."""
    path = own / "v2_mscoco_val2014_annotations.json"
    data = json.loads(path.read_text())
    for answer in data["annotations"][2]["answers"]:
        answer["answer"] = " "
    del data["annotations"][4]["answers"]
    path.write_text(json.dumps(data))
    found = run(own_task(task, own), max_unreadable=0.4).tasks["vqav2"]
    assert (found.samples, found.evaluated, found.failed) == (6, 4, "")
    blank, missing = found.unreadable.values()
    assert "record 2, 'answers': there is no reference, or only blank ones" in blank
    assert "record 4: 'answers' is missing" in missing
    failed = run(own_task(task, own)).tasks["vqav2"].failed
    assert "2 of 6 samples are unreadable, 33.3%, and max_unreadable allows 1.0%" in failed
    assert "only blank ones" in failed


class TestUnreadableImages:
    @pytest.fixture
    def damaged(self, own: Path) -> tuple[Path, bytes]:
        """An image that is no image; its first bytes."""
        image = sorted((own / "val2014").iterdir())[0]
        content = image.read_bytes()
        image.write_bytes(b"no image at all")
        return image, content

    def test_few_are_counted_and_named(self, task: MakeTask, own: Path, run: Run, damaged: tuple[Path, bytes],
                                       tmp_path: Path) -> None:  # fmt: skip
        sorted((own / "val2014").iterdir())[1].unlink()
        result = run(own_task(task, own), max_unreadable=0.7).tasks["vqav2"]
        assert not result.failed
        assert (result.samples, result.evaluated) == (6, 2)
        assert sorted("not an image" in why for why in result.unreadable.values()) == [False, False, True, True]
        assert sum("is not in" in why for why in result.unreadable.values()) == 2
        assert len(lines(tmp_path / "out/vqav2/scores.jsonl")) == 2
        assert "4 of 6 samples are unreadable" in (tmp_path / "out/results.md").read_text()

    def test_too_many_fail_the_task_and_keep_what_was_made(
        self, task: MakeTask, own: Path, run: Run, damaged: tuple[Path, bytes], tmp_path: Path
    ) -> None:
        result = run(own_task(task, own)).tasks["vqav2"]
        assert "2 of 6 samples are unreadable, 33.3%, and max_unreadable allows 1.0%" in result.failed
        assert damaged[0].name in result.failed
        assert result.metrics == {}
        assert sum("text" in r for r in lines(tmp_path / "out/vqav2/predictions.jsonl")) == 4

    def test_when_they_are_back_only_they_are_done(
        self, task: MakeTask, own: Path, run: Run, damaged: tuple[Path, bytes], tmp_path: Path
    ) -> None:
        """And the result is that of a run in which nothing was wrong."""
        run(own_task(task, own))
        again = run(own_task(task, own))
        assert again.speed["vqav2"]["samples"] == 0
        damaged[0].write_bytes(damaged[1])
        mended = run(own_task(task, own))
        assert not mended.tasks["vqav2"].failed
        run(own_task(task, own), folder="whole")
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")


class TestAnotherRun:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"seed": 3}, r"'seed' was 0 and is now 3"),
            ({"limit": 1}, r"'samples.count' was 2 and is now 1"),
            ({"prompt": "{image} why?"}, r"'task.prompt' was null and is now"),
            ({"generation": {"num_beams": 1}}, r"'generation.text.max_new_tokens' was 5 and is now 10"),
            ({"compat": True}, r"'task.compat' was false and is now true"),
        ],
    )
    def test_other_settings(self, change: dict, words: str, task: MakeTask, run: Run, tmp_path: Path) -> None:
        run(task("vqav2", limit=2))
        before = contents(tmp_path / "out")
        seed = change.pop("seed", 0)
        with pytest.raises(EvaluationError, match=rf"these predictions are of another run: .*{words}"):
            run(task("vqav2", **{"limit": 2, **change}), seed=seed)
        assert contents(tmp_path / "out") == before

    def test_more_samples_are_the_same_run(self, task: MakeTask, run: Run, tmp_path: Path) -> None:
        """Only what is new is done, and all is as if it had been asked for at once."""
        for name in ("vqav2", "coco"):
            run(task(name, limit=1))
            run(task(name, limit=3))
            longer = run(task(name, limit=4))
            assert longer.tasks[name].evaluated == 4
            assert longer.speed[name]["samples"] == 1
            assert run(task(name, limit=4)).speed[name]["samples"] == 0
            run(task(name, limit=4), folder="whole")
            told = [json.loads((tmp_path / f / name / "run.json").read_text()) for f in ("out", "whole")]
            assert [t.pop("asked_for") for t in told] == [[1, 3, 4], [4]]
            assert told[0] == told[1]
            for one in ("predictions.jsonl", "scores.jsonl"):
                assert (tmp_path / "out" / name / one).read_bytes() == (tmp_path / "whole" / name / one).read_bytes()

    def test_more_samples_that_begin_with_others_are_not(self, task: MakeTask, own: Path, run: Run) -> None:
        run(own_task(task, own, limit=2))
        path = own / "v2_OpenEnded_mscoco_val2014_questions.json"
        asked = json.loads(path.read_text())
        asked["questions"][0]["question"] = "why?"
        path.write_text(json.dumps(asked))
        with pytest.raises(EvaluationError, match=r"'samples.digest' was"):
            run(own_task(task, own, limit=4))

    def test_another_model(self, task: MakeTask, run: Run, model: MMInterleaved) -> None:
        run(task("vqav2", limit=2))
        weight = model.lm_head.head.weight
        before = weight.data.clone()
        try:
            weight.data[0, 0] += 1
            with pytest.raises(EvaluationError, match="'weights' was"):
                run(task("vqav2", limit=2))
        finally:
            weight.data.copy_(before)

    def test_other_samples(self, task: MakeTask, own: Path, run: Run) -> None:
        run(own_task(task, own))
        path = own / "v2_OpenEnded_mscoco_val2014_questions.json"
        path.write_text(path.read_text().replace("?", " now?"))
        with pytest.raises(EvaluationError, match=r"'samples\.digest' was"):
            run(own_task(task, own))

    def test_the_same_data_in_another_place_and_other_batches_are_no_other_run(
        self, task: MakeTask, own: Path, run: Run, tmp_path: Path
    ) -> None:
        run(own_task(task, own))
        shutil.move(own, tmp_path / "moved")
        again = run(own_task(task, tmp_path / "moved"), batch_size=5)
        assert again.speed["vqav2"]["samples"] == 0


class TestPredictionsFolder:
    @pytest.fixture
    def folder(self, task: MakeTask, run: Run, tmp_path: Path) -> Path:
        run(task("vqav2", limit=3))
        return tmp_path / "out/vqav2"

    def test_predictions_of_unknown_origin(self, folder: Path, task: MakeTask, run: Run) -> None:
        (folder / "run.json").unlink()
        with pytest.raises(EvaluationError, match=r"predictions without run\.json.*--overwrite"):
            run(task("vqav2", limit=3))

    def test_a_damaged_run_file(self, folder: Path, task: MakeTask, run: Run) -> None:
        (folder / "run.json").write_text("{")
        with pytest.raises(EvaluationError, match=r"run\.json: damaged"):
            run(task("vqav2", limit=3))

    @pytest.mark.parametrize("line", ["nonsense", '["a", "b"]', '{"id": "7"}'])
    def test_a_line_that_is_no_prediction(self, line: str, folder: Path, task: MakeTask, run: Run) -> None:
        path = folder / "predictions.jsonl"
        path.write_text(line + "\n" + path.read_text())
        with pytest.raises(EvaluationError, match=r"predictions\.jsonl, line 1: not a prediction"):
            run(task("vqav2", limit=3))

    def test_a_line_that_was_cut_off_is_redone(self, folder: Path, task: MakeTask, run: Run) -> None:
        path = folder / "predictions.jsonl"
        whole = path.read_text()
        path.rename(folder / "part-7.jsonl")
        (folder / "part-7.jsonl").write_text(whole[:-20])
        again = run(task("vqav2", limit=3))
        assert path.read_text() == whole
        assert again.speed["vqav2"]["samples"] == 2  # its batch runs as a whole
        assert not list(folder.glob("part-*"))

    def test_a_line_that_was_removed_is_redone(self, folder: Path, task: MakeTask, run: Run) -> None:
        path = folder / "predictions.jsonl"
        whole = path.read_text()
        path.write_text("".join(whole.splitlines(keepends=True)[1:]))
        run(task("vqav2", limit=3))
        assert path.read_text() == whole


def test_a_damaged_true_image_spoils_its_sample_only(task: MakeTask, run: Run, tmp_path: Path) -> None:
    """Found before anything is compared with it."""
    write_dataset("coco", tmp_path / "coco", Job(4, "val", 0, 48))
    image = sorted((tmp_path / "coco/val2014").iterdir())[1]
    image.write_bytes(image.read_bytes()[:-300])
    asked = task("coco", images=str(tmp_path / "coco"), annotations=str(tmp_path / "coco"))
    result = run(asked, max_unreadable=0.3).tasks["coco"]
    assert result.evaluated == 3
    assert image.name in str(result.unreadable)
    assert result.metrics["scene_images"]["values"]


def test_a_folder_that_cannot_be_written(task: MakeTask, run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"):
        run(task("vqav2", limit=2))


def test_a_prompt_that_is_too_long_spoils_its_sample_only(task: MakeTask, own: Path, run: Run) -> None:
    path = own / "v2_OpenEnded_mscoco_val2014_questions.json"
    data = json.loads(path.read_text())
    data["questions"][1]["question"] = "why? " * 3000
    path.write_text(json.dumps(data))
    result = run(own_task(task, own), max_unreadable=0.5).tasks["vqav2"]
    assert result.evaluated == 5
    ((_, why),) = result.unreadable.items()
    assert "tokens are more than the" in why
