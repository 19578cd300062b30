"""What is known beyond the references if a task's files are the toy world's: the scenes themselves.

`toyworld.json`, which lies beside the data, says what they were drawn from, and a picture's name says which it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..document import Image
from ..metrics import MetricResult
from ..metrics.toyworld import ScenePictures, scene_captions
from ..tasks import Sample, Task
from ..toyworld.scene import Scene
from ..toyworld.writers import ABOUT
from ..toyworld.writers.base import VERSION, Job

SHOWN = ("coco_karpathy", "flickr30k", "nocaps", "image2paragraph")  # tasks that describe the scene they are shown
DRAWN = ("coco", "lncoco", "ade20k")  # tasks that draw a scene
NUMBERS = 1_000_000  # pictures of a split are numbered from a multiple of this on


def find_about(task: Task) -> dict[str, Any] | None:
    """What the toy world wrote about a task's files; None: they are not the toy world's, or of another version."""
    source = task.source()
    for folder in (source.annotations, source.annotations.parent, source.images.root, source.images.root.parent):
        path = folder / ABOUT
        if path.is_file():
            try:
                about = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                return None
            return about if isinstance(about, dict) and about.get("toyworld") == VERSION else None
    return None


def metric_for(name: str, about: dict[str, Any] | None) -> str:
    """Name of the metric that knows the scenes of a kind of task; "": there is none."""
    if about is None:
        return ""
    return "scene_captions" if name in SHOWN else "scene_pictures" if name in DRAWN else ""


def scene_metric(name: str, samples: Sequence[Sample], predictions: dict[str, Any], about: dict[str, Any],
                 device: torch.device | str) -> MetricResult:  # fmt: skip
    """What captions say right of their scenes, or what the toy world's reader finds in drawn pictures.

    Args:
        name: of `metric_for`.
        samples: what was asked.
        predictions: texts, or paths of pictures, by sample.
        about: what `find_about` found.
        device: where the reader runs.
    """
    job = Job(int(about["count"]), about["split"], int(about["seed"]), int(about["size"]))
    scenes = {sample.id: _scene(job, _picture(sample)) for sample in samples}
    compute: Callable[[Any, Any], MetricResult] = scene_captions
    if name == "scene_pictures":
        compute = ScenePictures(device=device)
    return compute(predictions, scenes)


def _picture(sample: Sample) -> Path:
    """The picture of the scene, given or to be drawn."""
    if isinstance(sample.reference, dict):
        return Path(sample.reference["photo"])
    given = [s.source for s in sample.document.segments if isinstance(s, Image) and s.source is not None]
    return Path(str(given[0] if given else sample.reference[0]))


def _scene(job: Job, picture: Path) -> Scene:
    found = re.search(r"\d+$", picture.stem)
    if found is None:
        raise ValueError(f"the toy world numbers its pictures, but '{picture.name}' has no number")
    return job.scene((int(found[0]) - 1) % NUMBERS)[0]
