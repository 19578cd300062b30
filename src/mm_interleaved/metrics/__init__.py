"""Metrics: scores of predictions, given references. They take plain data, and state the reason if they cannot run.

    result = caption_scores({"17": "a cat"}, {"17": ["A cat.", "One cat on a mat."]})
    result.values                       # {"cider": ..., "bleu_4": ...}, in the unit of the papers
    result.per_sample["cider"]["17"]    # the sample's score, for every value that is a mean over samples
    result.skipped, result.fix          # "there is no java command", "install Java, ..."

| module | metrics | references by id |
|---|---|---|
| `captions` | `caption_scores` | captions |
| `vqa` | `VQAAccuracy`, `gqa_accuracy` | `VQAReference`; the answer |
| `text_answers` | `ANLS`, `RELAXED_ACCURACY`, `EXACT_MATCH` | right answers |
| `dialogue` | `dialogue_ranking` | `DialogueReference` |
| `grounding` | `grounding_accuracy` | boxes in 1/999 of the image |
| `segmentation` | `MeanIoU`, `SegmentedMeanIoU` | label maps |
| `images` | `FID` | images |
| `clip` | `ImageSimilarity`, `TextSimilarity`; `CLIP.rerank` | images; texts |
"""

from .result import (
    Metric,
    MetricResult,
    MissingRequirement,
    Scores,
    aligned,
    confidence_interval,
    gives,
    reports_missing,
    value_names,
)

__all__ = [
    "Metric", "MetricResult", "MissingRequirement", "Scores", "aligned", "confidence_interval", "gives",
    "reports_missing", "value_names",
]  # fmt: skip
