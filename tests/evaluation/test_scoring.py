"""Metrics get what they should: right predictions have full marks, wrong ones none, and what is missing is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from mm_interleaved.evaluation import MetricConfig
from mm_interleaved.evaluation import scoring as scoring_module
from mm_interleaved.evaluation.scoring import METRICS, ScoringInputs, as_data, main_scores, score_task
from mm_interleaved.metrics import MetricResult
from mm_interleaved.metrics.images import FID
from mm_interleaved.tasks import TASKS, Sample, make_task
from mm_interleaved.tasks.facts import find_facts

from .conftest import MakeTask

ANSWERS = {
    "vqa_accuracy": lambda s: max(s.reference, key=s.reference.count),
    "vizwiz_accuracy": lambda s: max(s.reference, key=s.reference.count),
    "gqa_accuracy": lambda s: s.reference,
    "grounding_accuracy": lambda s: "({:03d},{:03d})({:03d},{:03d})</box>".format(*s.reference),
    "captions": lambda s: s.reference[0],
}


@pytest.fixture
def scored(task: MakeTask, tmp_path: Path) -> Callable[..., ScoringInputs]:
    """A task with made-up predictions."""

    def make(name: str, predict: Callable[[Sample, int], dict[str, Any]], **settings: Any) -> ScoringInputs:
        made = make_task(task(name, **settings))
        samples = list(made.samples())
        records = [{"index": i, "id": s.id, **predict(s, i)} for i, s in enumerate(samples)]
        return ScoringInputs(made, samples, records, tmp_path, MetricConfig(), facts=find_facts(made))

    return make


def copied(folder: Path) -> Callable[[Sample, int], dict[str, Any]]:
    """The true images as predictions."""

    def predict(sample: Sample, index: int) -> dict[str, Any]:
        names = []
        references = [sample.reference["photo"]] if isinstance(sample.reference, dict) else sample.reference
        for slot, image in enumerate(references):
            names.append(f"{index}_{slot}.png")
            if isinstance(image, PIL.Image.Image):
                image.save(folder / names[-1])
            else:
                shutil.copy(image, folder / names[-1])
        kept = {"references": names} if isinstance(references[0], PIL.Image.Image) else {}
        return {"images": names, **kept}

    return predict


@pytest.mark.parametrize("name", [n for n, t in TASKS.items() if set(t.metrics) & set(ANSWERS) - {"captions"}])
def test_right_answers(name: str, scored: Callable[..., ScoringInputs]) -> None:
    (metric,) = TASKS[name].metrics
    given = scored(name, lambda s, _: {"prediction": ANSWERS[metric](s)})
    result, scores = score_task(given, 0)
    assert result[metric]["values"]["accuracy"] == pytest.approx(100, abs=15 if "vqa" in name else 1e-9)
    value, ranking = main_scores(scores)
    assert value == "accuracy"
    assert ranking.keys() == {sample.id for sample in given.samples}
    low, high = result[metric]["intervals"]["accuracy"]
    assert low <= result[metric]["values"]["accuracy"] <= high
    wrong = scored(name, lambda s, _: {"prediction": "none of it"})
    assert score_task(wrong, 0)[0][metric]["values"]["accuracy"] == 0


@pytest.mark.parametrize(
    ("name", "metric", "value"),
    [("docvqa", "anls", "anls"), ("chartqa", "relaxed_accuracy", "relaxed_accuracy"),
     ("ocrvqa", "exact_match", "accuracy"), ("est_vqa", "anls", "anls")],
)  # fmt: skip
def test_answers_about_text(name: str, metric: str, value: str, scored: Callable[..., ScoringInputs]) -> None:
    """Also of each subset: the two files of ChartQA, the two languages of EST-VQA."""
    given = scored(name, lambda s, index: {"prediction": s.reference[-1] if index else "none of it"})
    result, scores = score_task(given, 0)
    values = result[metric]["values"]
    assert values[value] == 75
    assert main_scores(scores)[0] == value
    subsets = {key.partition("subset=")[2]: found for key, found in values.items() if key.startswith(f"{value}/")}
    wanted = {"chartqa": {"human": 50, "augmented": 100}, "est_vqa": {"en": 50, "zh": 100}}
    assert subsets == wanted.get(name, {})


@pytest.mark.parametrize("name", [n for n, t in TASKS.items() if t.metrics == ("captions",)])
def test_right_captions(name: str, scored: Callable[..., ScoringInputs]) -> None:
    given = scored(name, lambda s, _: {"prediction": ANSWERS["captions"](s)})
    values = METRICS["captions"](given).values
    bleu = next(v for k, v in values.items() if k.startswith("bleu_4"))
    assert bleu == pytest.approx(100, abs=1e-3)


def test_captions_by_domain(scored: Callable[..., ScoringInputs]) -> None:
    """Each domain is scored as a set of its own."""
    given = scored("nocaps", lambda s, _: {"prediction": s.reference[0]})
    values = METRICS["captions"](given).values
    domains = {key.partition("domain=")[2] for key in values if "/" in key}
    assert domains == {"in-domain", "near-domain", "out-domain"}


def test_right_ranks(scored: Callable[..., ScoringInputs]) -> None:
    given = scored("visdial", lambda s, _: {"scores": s.reference["relevance"], "lengths": [2] * 100})
    values = METRICS["dialogue_ranking"](given).values
    assert values["ndcg"] == pytest.approx(100)
    assert values["ndcg_per_token"] == pytest.approx(100)
    turned = scored("visdial", lambda s, _: {"scores": s.reference["relevance"], "lengths": [1] * 100})
    turned.records[0]["lengths"][turned.samples[0].reference["index"]] = 10**6  # a sum near 0 either way
    for record in turned.records:
        record["scores"] = [r - 1.5 for r in record["scores"]]
    values = METRICS["dialogue_ranking"](turned).values
    assert values["ndcg"] == pytest.approx(100)


@pytest.mark.parametrize("name", ["coco_karpathy", "flickr30k", "nocaps"])
def test_captions_of_their_own_scenes_are_right(name: str, scored: Callable[..., ScoringInputs]) -> None:
    """The scene behind an image is found again: what the references say is true of it, and of no other."""
    right = METRICS["scene_captions"](scored(name, lambda s, _: {"prediction": s.reference[0]}))
    assert right.values["facts_right"] == 100
    given = scored(name, lambda s, _: {"prediction": s.reference[0]})
    for record, other in zip(given.records, [*given.records[1:], given.records[0]], strict=True):
        record["prediction"], other["prediction"] = other["prediction"], record["prediction"]
    assert METRICS["scene_captions"](given).values["facts_right"] < 60


@pytest.mark.parametrize("name", ["coco", "lncoco", "ade20k"])
def test_the_true_images_show_their_scenes(name: str, scored: Callable[..., ScoringInputs], tmp_path: Path) -> None:
    right = METRICS["scene_images"](scored(name, copied(tmp_path)))
    assert right.values["found_kind"] > 60
    blank = PIL.Image.new("RGB", (64, 64), "gray")
    blank.save(tmp_path / "blank.png")
    assert METRICS["scene_images"](scored(name, lambda s, _: {"images": ["blank.png"]})).values["found_kind"] < 20


@pytest.mark.parametrize("name", ["coco", "vist", "pororo"])
def test_fid_compares_drawn_with_true_images(
    name: str, scored: Callable[..., ScoringInputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Colors(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)

    monkeypatch.setattr(
        scoring_module, "FID", lambda weights, **options: FID(extractor=Colors(), name="colors", **options)
    )
    same = METRICS["fid"](scored(name, copied(tmp_path)))
    assert same.values == pytest.approx({"fid_64": 0, "fid_native": 0}, abs=1e-6)
    given = scored(name, copied(tmp_path))
    for path in tmp_path.glob("*.png"):
        kept = given.true_images()
        if path not in kept.values():
            PIL.Image.open(path).convert("L").save(path)
    if name != "pororo":  # whose true images are those files
        assert METRICS["fid"](given).values["fid_native"] > 1e-4


def test_label_maps_are_cut_like_the_images(scored: Callable[..., ScoringInputs], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A map that is wider than high loses its ends, unless the original's way is asked for."""
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 7
    PIL.Image.fromarray(wide).save(tmp_path / "wide.png")
    shapes: list[tuple[int, ...]] = []

    def look(predictions: Any, references: dict[str, np.ndarray]) -> MetricResult:
        shapes.extend(labels.shape for labels in references.values())
        assert {int(v) for labels in references.values() for v in labels[:, labels.shape[1] // 2]} == {7}
        return MetricResult()

    monkeypatch.setattr(scoring_module, "SegmentedMeanIoU", lambda segmenter: look)
    for compat, shape in ((False, (10, 10)), (True, (10, 30))):
        given = scored("ade20k", lambda s, _: {"images": ["wide.png"]}, compat=compat)
        for sample in given.samples:
            sample.reference["labels"] = str(tmp_path / "wide.png")
        shapes.clear()
        METRICS["miou"](given)
        assert set(shapes) == {shape}


@pytest.mark.parametrize(
    ("name", "metric", "setting"),
    [("coco", "fid", "inception"), ("coco", "text_similarity", "clip"), ("vist", "image_similarity", "clip"),
     ("ade20k", "miou", "segmenter")],
)  # fmt: skip
def test_what_is_missing_is_said_with_what_would_mend_it(
    name: str, metric: str, setting: str, scored: Callable[..., ScoringInputs], tmp_path: Path
) -> None:
    result, _ = score_task(scored(name, copied(tmp_path)), 0)
    assert result[metric]["skipped"]
    assert f"metrics.{setting}=" in result[metric]["fix"]
    assert result[metric]["values"] == {}


def test_data_that_do_not_fit_spoil_one_metric_only(scored: Callable[..., ScoringInputs], tmp_path: Path) -> None:
    given = scored("coco", copied(tmp_path))
    (tmp_path / given.records[0]["images"][0]).write_bytes(b"no image")
    result, _ = score_task(given, 0)
    assert "is not an image that can be read" in result["scene_images"]["failed"]
    assert "skipped" in result["text_similarity"]
    one = scored("vqav2", lambda s, _: {"prediction": "yes"})
    one.samples[0].reference[1:] = []
    assert f"sample {one.samples[0].id}" in score_task(one, 0)[0]["vqa_accuracy"]["failed"]


def test_both_rules_are_told_apart(scored: Callable[..., ScoringInputs]) -> None:
    """For the release's rule "pizza box" is "box"; each value has its own scores."""
    given = scored("vqav2", lambda s, _: {"prediction": "pizza box"})
    for sample in given.samples:
        sample.reference[:] = ["pizza box"] * 10
    result, scores = score_task(given, 0)
    assert result["vqa_accuracy"]["intervals"] == {"accuracy": [100, 100], "accuracy_compat": [0, 0]}
    assert set(scores["vqa_accuracy"]["accuracy"].values()) == {100}
    assert set(scores["vqa_accuracy"]["accuracy_compat"].values()) == {0}


def test_an_interval_is_that_of_its_own_scores() -> None:
    """Also where two values are equal: 50 by each rule, but by one of them every answer is half right."""
    each, half = dict.fromkeys(range(4), 50.0), {i: 100.0 * (i % 2) for i in range(4)}
    found = MetricResult.of_means({"accuracy": half, "accuracy_compat": each}, others={"corpus": 50.0})
    assert set(found.values.values()) == {50.0}
    data = as_data(found, seed=0, resamples=200)
    assert data["intervals"].keys() == {"accuracy", "accuracy_compat"}
    assert data["intervals"]["accuracy_compat"] == [50.0, 50.0]
    low, high = data["intervals"]["accuracy"]
    assert low < 50 < high
    assert "intervals" not in as_data(MetricResult({"fid": 3.0}), seed=0, resamples=50)


def test_intervals_of_ratios_use_the_weights() -> None:
    scores, weights = {"a": {1: 100.0, 2: 0.0}}, {"a": {1: 5.0, 2: 0.0}}
    data = as_data(MetricResult.of_means(scores, weights), seed=0, resamples=50)
    assert data == {"values": {"a": 100.0}, "intervals": {"a": [100.0, 100.0]}}


def _without_key(given: ScoringInputs) -> MetricResult:
    return MetricResult(given.by_id("no_such_key"))


def _no_result(given: ScoringInputs) -> dict[str, float]:
    return {"half": 0.5}


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (_without_key, "the metric 'own' raised KeyError: 'no_such_key'"),
        (_no_result, "the metric 'own' raised TypeError: it returned a dict, not a MetricResult"),
    ],
)
def test_a_mistake_in_a_metric_spoils_this_metric_only(
    metric: Callable, said: str, scored: Callable[..., ScoringInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS._values, "own", metric)
    given = scored("vqav2", lambda s, _: {"prediction": "yes"})
    given.task.metrics = ("own", *given.task.metrics)
    results, _ = score_task(given, 0)
    assert results["own"] == {"values": {}, "failed": said}
    assert results["vqa_accuracy"]["values"]
