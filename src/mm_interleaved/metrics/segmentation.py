"""Mean IoU of label maps as for ADE20K, and the segmenter that labels generated images."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    AutoProcessor,
)

from .image_files import ImageLike, rgb
from .result import MetricResult, MissingRequirement, aligned, reports_missing

CLASSES = 150  # of ADE20K; labels 1 to 150, 0 is unlabelled
_EPSILON = 1e-10  # the release's
UNIVERSAL = ("oneformer", "mask2former", "maskformer", "eomt")  # model types whose heads label any kind of segment
FIX = "fetch shi-labs/oneformer_ade20k_dinat_large (the release's) or another ADE20K model and give its folder"


def areas(predicted: np.ndarray, label: np.ndarray, classes: int = CLASSES) -> np.ndarray:
    """Pixels of each class that agree, are predicted, and are labelled: int64 [3, classes].

    Args:
        predicted: 1 to `classes` (0: nothing), integers [H, W]; not counted where the label is 0.
        label: 0 (unlabelled) to `classes`, integers [H, W].
        classes: the number of classes.

    Raises:
        ValueError: the shapes differ, or a number is out of range.
    """
    if predicted.shape != label.shape:
        raise ValueError(f"the predicted map is {predicted.shape}, the label map {label.shape}; resize it first")
    for name, values in (("predicted", predicted), ("label", label)):
        if values.size and not all(0 <= extreme <= classes for extreme in (values.min(), values.max())):
            raise ValueError(f"{name} map: classes must be 0 to {classes}, got {values.min()} to {values.max()}")
    seen = np.where(label == 0, 0, predicted)
    kinds = (seen[seen == label], seen, label)
    return np.stack([np.bincount(kind.ravel().astype(np.int64), minlength=classes + 1)[1:] for kind in kinds])


@dataclass(frozen=True)
class MeanIoU:
    """Mean intersection over union of label maps (arrays by id), in percent.

    Values: `miou`, the mean over all classes, absent ones as 0, as the release has it; `miou_present`, over the classes
    in the label maps; `miou_per_image`, the mean over images of the mean over the classes in the image's label map.

    Attributes:
        classes: how many there are.
    """

    classes: int = CLASSES

    @reports_missing
    def __call__(
        self, predictions: Mapping[Hashable, np.ndarray], references: Mapping[Hashable, np.ndarray]
    ) -> MetricResult:
        """Score label maps; see `areas` for their values.

        Raises:
            ValueError: the ids differ, or a map does not fit; the message names the sample.
        """
        counts: dict[Hashable, np.ndarray] = {}
        for key, predicted, label in aligned(predictions, references):
            try:
                counts[key] = areas(predicted, label, self.classes)
            except ValueError as error:
                raise ValueError(f"sample {key!r}: {error}") from error
        whole = sum(counts.values(), np.zeros((3, self.classes), dtype=np.int64))
        scores = {key: _over_present(count) for key, count in counts.items()}
        values = {"miou": 100 * float(_iou(whole).mean()), "miou_present": _over_present(whole),
                  "miou_per_image": fmean(scores.values())}  # fmt: skip
        return MetricResult(values, {"miou_per_image": scores})


def _iou(counts: np.ndarray) -> np.ndarray:
    shared, predicted, labelled = counts
    return shared / (predicted + labelled - shared + _EPSILON)


def _over_present(counts: np.ndarray) -> float:
    present = counts[2] > 0
    return 100 * float(_iou(counts)[present].mean()) if present.any() else 0.0


@dataclass(frozen=True)
class Segmenter:
    """A segmentation model of transformers from a local folder; nothing is downloaded.

    Attributes:
        folder: model and processor, as transformers saves them; trained on classes 0 to 149 for labels 1 to 150.
        device: where it runs.
    """

    folder: Path | None
    device: torch.device | str = "cpu"

    @cached_property
    def _parts(self) -> tuple[Any, Any, dict[str, Any]]:
        if self.folder is None or not (self.folder / "config.json").is_file():
            where = "no folder was given" if self.folder is None else f"{self.folder} has no config.json"
            raise MissingRequirement(f"no segmentation model: {where}", FIX)
        local = {"local_files_only": True}
        kind = AutoConfig.from_pretrained(self.folder, **local).model_type
        universal = kind in UNIVERSAL
        model = (AutoModelForUniversalSegmentation if universal else AutoModelForSemanticSegmentation).from_pretrained(
            self.folder, **local
        )
        asked = {"task_inputs": ["semantic"]} if kind == "oneformer" else {}
        processor = (AutoProcessor if asked else AutoImageProcessor).from_pretrained(self.folder, **local)
        return model.to(self.device).eval(), processor, asked

    @torch.inference_mode()
    def __call__(self, image: ImageLike, size: tuple[int, int]) -> np.ndarray:
        """Label an image: 1 and up, int64 [height, width] of the size asked for.

        Args:
            image: is first stretched to the size, bicubically, as the release does.
            size: width and height of the label map it will be compared with.
        """
        model, processor, asked = self._parts
        stretched = rgb(image).resize(size, PIL.Image.Resampling.BICUBIC)
        inputs = processor(images=[stretched], return_tensors="pt", **asked).to(self.device)
        (found,) = processor.post_process_semantic_segmentation(model(**inputs), target_sizes=[size[::-1]])
        return found.cpu().numpy().astype(np.int64) + 1


@dataclass(frozen=True)
class SegmentedMeanIoU:
    """`MeanIoU` of generated images (by id) against label maps [H, W] that they were drawn from."""

    segmenter: Segmenter
    classes: int = CLASSES

    @reports_missing
    def __call__(
        self, predictions: Mapping[Hashable, ImageLike], references: Mapping[Hashable, np.ndarray]
    ) -> MetricResult:
        """Segment the images and score the maps.

        Raises:
            ValueError: the ids differ, or a label is out of range.
        """
        rows = aligned(predictions, references)
        maps = {key: self.segmenter(image, label.shape[::-1]) for key, image, label in rows}
        return MeanIoU(self.classes)(maps, references)
