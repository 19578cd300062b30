"""Scores of predictions against references. A metric takes plain data, knows no model, and says when it cannot run.

    result = CaptionMetrics()({"17": "a cat"}, {"17": ["A cat.", "One cat on a mat."]})
    result.values, result.per_sample    # figures by name, in the unit of the papers; CIDEr of each sample
    result.skipped, result.fix          # "bleu_4 and cider: there is no java command", "install Java, ..."

| module | metrics | references by id |
|---|---|---|
| `captions` | `CaptionMetrics` | captions |
| `vqa` | `VQAAccuracy`, `gqa_accuracy` | `VQAReference`; the answer |
| `dialogue` | `dialogue_ranking` | `DialogueReference` |
| `grounding` | `grounding_accuracy` | boxes in 1/999 of the image |
| `segmentation` | `MeanIoU`, `SegmentedMeanIoU` | label maps |
| `images` | `FID` | images |
| `clip` | `ImageSimilarity`, `TextSimilarity`; `CLIP.rerank` | images; texts |
| `toyworld` | `SceneImages`, `scene_captions` | scenes |
"""

from .result import Metric, MetricResult, MissingRequirement, aligned, confidence_interval, reports_missing

__all__ = [
    "Metric", "MetricResult", "MissingRequirement", "aligned", "confidence_interval", "reports_missing",
]  # fmt: skip
