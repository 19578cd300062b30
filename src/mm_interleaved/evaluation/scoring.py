"""Scores of the predictions of a task: maps the metric names of tasks to functions.

A metric that cannot run gives its reason and a fix; the others still run.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..io.images import load_pixels
from ..metrics import MetricResult, Scores, confidence_interval, gives, value_names
from ..metrics.captions import caption_scores
from ..metrics.clip import CLIP, ImageSimilarity, TextSimilarity
from ..metrics.dialogue import RANKINGS, DialogueReference, dialogue_ranking
from ..metrics.grounding import grounding_accuracy
from ..metrics.images import FID
from ..metrics.segmentation import CLASSES, SegmentedMeanIoU, Segmenter
from ..metrics.text_answers import ANLS, EXACT_MATCH, RELAXED_ACCURACY
from ..metrics.vqa import VQAAccuracy, VQAReference, gqa_accuracy, vizwiz_score
from ..plugins import Registry
from ..tasks import Sample, Task
from ..tasks.facts import Facts, find_facts
from .config import EvaluationError, MetricConfig
from .predictions import Record

logger = logging.getLogger(__name__)

# Errors of a metric: unsuitable data and weights that cannot be loaded, then mistakes in the code of a plug-in.
UNSUITABLE = (ValueError, OSError, RuntimeError)
MISTAKES = (LookupError, TypeError, AttributeError, NameError, ArithmeticError, AssertionError, ImportError)
NAMED = 20  # unreadable samples that the results of a failed task list


@dataclass(frozen=True)
class ScoringInputs:
    """The inputs of metrics: the evaluated samples of a task and their predictions.

    Attributes:
        task: the task.
        samples, records: samples and their predictions, in the same order.
        folder: the folder that the paths of the records are relative to.
        metrics: files and folders that metrics need.
        device: the device for their networks.
        facts: facts about the task's files from a plug-in.
    """

    task: Task
    samples: Sequence[Sample]
    records: Sequence[Record]
    folder: Path
    metrics: MetricConfig
    device: torch.device | str = "cpu"
    facts: Facts | None = None

    def by_id(self, key: str) -> dict[str, Any]:
        """The value of a key of the records, by sample."""
        return {record["id"]: record[key] for record in self.records}

    def references(self, make: Callable[[Sample], Any] = lambda sample: sample.reference) -> dict[str, Any]:
        """References by sample."""
        return {sample.id: make(sample) for sample in self.samples}

    def images(self) -> dict[tuple[str, int], Path]:
        """Generated images, by sample and slot."""
        return {(r["id"], k): self.folder / name for r in self.records for k, name in enumerate(r["images"])}

    def true_images(self) -> dict[tuple[str, int], Path]:
        """Reference images, by sample and slot."""
        found = {}
        for sample, record in zip(self.samples, self.records, strict=True):
            kept = [self.folder / name for name in record.get("references", ())]
            for slot, path in enumerate(kept or [Path(name) for name in sample.reference]):
                found[sample.id, slot] = path
        return found


# ---- one function for each metric name of tasks


def _with_parts(metric: Callable[..., MetricResult], given: ScoringInputs, key: str) -> MetricResult:
    """A metric of texts over all samples, and over those of each value that `meta` has under a key."""
    predictions, references = given.by_id("prediction"), given.references()
    result = metric(predictions, references)
    parts: dict[str, list[str]] = defaultdict(list)
    for sample in given.samples:
        if key in sample.meta:
            parts[str(sample.meta[key])].append(sample.id)
    for name, ids in sorted(parts.items()):
        part = metric({i: predictions[i] for i in ids}, {i: references[i] for i in ids})
        result.values.update({f"{value}/{key}={name}": found for value, found in part.values.items()})
    return result


@gives("cider", "bleu_4")
def captions(given: ScoringInputs) -> MetricResult:
    """Caption metrics over all samples, and over each domain if the samples have one."""
    return _with_parts(caption_scores, given, "domain")


@gives("accuracy", "accuracy_compat")
def vqa_accuracy(given: ScoringInputs) -> MetricResult:
    """VQA accuracy, for VQAv2, OK-VQA and TextVQA."""
    return VQAAccuracy()(given.by_id("prediction"), given.references(_people))


@gives("accuracy", "accuracy_compat")
def vizwiz_accuracy(given: ScoringInputs) -> MetricResult:
    """VQA accuracy by the rules of VizWiz."""
    return VQAAccuracy(vizwiz_score)(given.by_id("prediction"), given.references(_people))


@gives("accuracy", "accuracy_compat")
def gqa(given: ScoringInputs) -> MetricResult:
    """Exact match with the answers of GQA."""
    return gqa_accuracy(given.by_id("prediction"), given.references())


@gives(*ANLS.rules)
def anls(given: ScoringInputs) -> MetricResult:
    """ANLS, for documents and scene text."""
    return _with_parts(ANLS, given, "subset")


@gives(*RELAXED_ACCURACY.rules)
def relaxed_accuracy(given: ScoringInputs) -> MetricResult:
    """Relaxed accuracy, for ChartQA, also of its questions by people and by a machine."""
    return _with_parts(RELAXED_ACCURACY, given, "subset")


@gives(*EXACT_MATCH.rules)
def exact_match(given: ScoringInputs) -> MetricResult:
    """Exact match, for OCR-VQA and DVQA."""
    return _with_parts(EXACT_MATCH, given, "subset")


@gives(*(f"{name}{how}" for name in RANKINGS for how in ("", "_per_token")))
def ranking(given: ScoringInputs) -> MetricResult:
    """VisDial's ranking metrics; `..._per_token` are those of log-probabilities divided by the options' lengths."""
    references = given.references(lambda s: DialogueReference(tuple(s.reference["relevance"]), s.reference["index"]))
    result = dialogue_ranking(given.by_id("scores"), references)
    shared = {r["id"]: [a / n for a, n in zip(r["scores"], r["lengths"], strict=True)] for r in given.records}
    other = dialogue_ranking(shared, references).per_sample
    return MetricResult.of_means({**result.per_sample, **{f"{name}_per_token": found for name, found in other.items()}})


@gives("accuracy", "mean_iou", "unparsed")
def grounding(given: ScoringInputs) -> MetricResult:
    """Accuracy of boxes in text."""
    return grounding_accuracy(given.by_id("prediction"), given.references(lambda s: tuple(map(float, s.reference))))


@gives("fid_64", "fid_native")
def fid(given: ScoringInputs) -> MetricResult:
    """FID at the release's 64 pixels and at native resolution."""
    options = given.metrics
    metric = FID(_path(options.inception), cache=_path(options.cache), device=given.device)
    return metric(given.images(), given.true_images())


@gives("clip_text_image")
def text_similarity(given: ScoringInputs) -> MetricResult:
    """CLIP similarity of generated images and their prompts."""
    texts = {(s.id, 0): str(s.meta["caption"]) for s in given.samples}
    found = TextSimilarity(CLIP(_path(given.metrics.clip), given.device))(given.images(), texts)
    return found.grouped(sample_of)


@gives("clip_image_image")
def image_similarity(given: ScoringInputs) -> MetricResult:
    """CLIP similarity of generated and reference images."""
    similarity = ImageSimilarity(CLIP(_path(given.metrics.clip), given.device))
    return similarity(given.images(), given.true_images()).grouped(sample_of)


@gives("miou", "miou_present", "miou_per_image")
def miou(given: ScoringInputs) -> MetricResult:
    """mIoU of a segmenter's labels for the generated images and the label maps, for ADE20K."""
    segmenter = Segmenter(_path(given.metrics.segmenter), given.device)
    images = {r["id"]: given.folder / r["images"][0] for r in given.records}
    return SegmentedMeanIoU(segmenter)(images, given.references(_labels))


METRICS: Registry[Callable[[ScoringInputs], MetricResult]] = Registry("mm_interleaved.metrics", "metric", built_in={
    "captions": captions, "vqa_accuracy": vqa_accuracy, "vizwiz_accuracy": vizwiz_accuracy, "gqa_accuracy": gqa,
    "anls": anls, "relaxed_accuracy": relaxed_accuracy, "exact_match": exact_match, "dialogue_ranking": ranking,
    "grounding_accuracy": grounding, "fid": fid, "text_similarity": text_similarity,
    "image_similarity": image_similarity, "miou": miou,
})  # fmt: skip
SETTINGS = {"fid": "inception", "text_similarity": "clip", "image_similarity": "clip", "miou": "segmenter"}
"""The `metrics` setting with the file or folder of each metric that needs one."""


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def sample_of(key: Hashable) -> Hashable:
    """The sample of an image. Intervals resample whole stories, since images of one story are not independent."""
    assert isinstance(key, tuple)
    return key[0]


def _people(sample: Sample) -> VQAReference:
    types = [str(sample.meta.get(key) or "") for key in ("question_type", "answer_type")]
    try:
        return VQAReference(tuple(sample.reference), *types)
    except ValueError as error:
        raise ValueError(f"sample {sample.id}: {error}") from None


def _labels(sample: Sample) -> np.ndarray:
    """A label map, cropped to the central square if its image was, else whole: integers [H, W]."""
    path = sample.reference["labels"]
    labels = np.asarray(load_pixels(path, f"sample {sample.id}"))
    if labels.ndim != 2 or labels.max() > CLASSES:
        raise ValueError(f"sample {sample.id}: {path} must have labels 0 to {CLASSES} in one channel")
    if sample.reference["fit"] == "center":
        height, width = labels.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        labels = labels[top : top + side, left : left + side]
    return labels


# ---- a task's results


@dataclass
class TaskResult:
    """The results of a task.

    Attributes:
        task, phase: the task and the part of the data set.
        samples: number of samples.
        evaluated: number of evaluated samples.
        unreadable: why the others could not be read, by id; for a failed task only the first ones.
        failed: why there is no result; "": there is one.
        origin: the origin of the files, if a plug-in recognises them; "": presumably the official ones.
        notes: other remarks about the values.
        metrics: by name: `values`, `intervals` of some of them, and `skipped` with `fix`, or `failed`.
    """

    task: str
    phase: str
    samples: int = 0
    evaluated: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    failed: str = ""
    origin: str = ""
    notes: list[str] = field(default_factory=list)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)


SampleScores = dict[str, dict[str, Scores]]
"""By metric, value and sample: `scores["vqa_accuracy"]["accuracy"]["17"]`."""


def main_scores(scores: SampleScores) -> tuple[str, Scores]:
    """The value that samples are sorted by, with their scores: the first value of the first metric that has scores."""
    found = [(name, of_samples) for values in scores.values() for name, of_samples in values.items()]
    return found[0] if found else ("", {})


def known_values(task: Task) -> list[str] | None:
    """The names of the values that a task's metrics can give; None: one of them does not say, see `gives`.

    Raises:
        InputError: a plug-in cannot read what the task's files are about.
    """
    facts = find_facts(task)
    metrics = (*task.metrics, *(facts.metrics if facts is not None else ()))
    found = [value_names(METRICS[name]) for name in metrics if name in METRICS]
    if len(found) < len(metrics) or None in found:
        return None
    return [name for names in found if names is not None for name in names]


def score_task(given: ScoringInputs, seed: int) -> tuple[dict[str, dict[str, Any]], SampleScores]:
    """All metrics of a task as plain data, and the scores of its samples."""
    results: dict[str, dict[str, Any]] = {}
    scores: SampleScores = {}
    for name in (*given.task.metrics, *(given.facts.metrics if given.facts is not None else ())):
        if name not in METRICS:
            raise EvaluationError(f"task '{given.task.name}': {METRICS.unknown(name)}")
        try:
            result = METRICS[name](given)
            if not isinstance(result, MetricResult):
                raise TypeError(f"it returned a {type(result).__name__}, not a MetricResult")
            _check_names(name, result)
        except UNSUITABLE as error:
            results[name] = {"values": {}, "failed": " ".join(str(error).split()) or type(error).__name__}
            continue
        except MISTAKES as error:
            problem = f"{METRICS.describe(name)} raised {type(error).__name__}: {' '.join(str(error).split())}"
            logger.warning("%s", problem, exc_info=error)
            results[name] = {"values": {}, "failed": problem}
            continue
        results[name] = as_data(result, seed, given.metrics.resamples)
        if result.skipped is not None and name in SETTINGS:
            results[name]["fix"] = f"{result.fix}, as metrics.{SETTINGS[name]}=..."
        if result.per_sample:
            scores[name] = result.per_sample
    return results, scores


def _check_names(metric: str, result: MetricResult) -> None:
    """Check that a metric declares the names of its values, if it declares any."""
    declared = value_names(METRICS[metric])
    others = [name for name in result.values if "/" not in name and declared is not None and name not in declared]
    if others:
        raise TypeError(f"it gives '{others[0]}', which its decorator @gives does not name")


def as_data(result: MetricResult, seed: int, resamples: int) -> dict[str, Any]:
    """The result as plain data. Every value that is a mean of samples' scores has an interval."""
    data: dict[str, Any] = {"values": result.values}
    if result.per_sample:
        data["intervals"] = {
            name: list(confidence_interval(
                list(scores.values()), seed=seed, resamples=resamples,
                weights=list(result.weights[name].values()) if name in result.weights else None,
            ))
            for name, scores in result.per_sample.items()
        }  # fmt: skip
    if result.skipped is not None:
        data |= {"skipped": result.skipped, "fix": result.fix}
    return data
