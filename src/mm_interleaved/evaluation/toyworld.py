"""What is known beyond the references if a task's files are the toy world's: the scenes themselves.

`toyworld.json`, which lies beside the data, says what they were drawn from, and an image's name says which it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toyworld.scene import Scene
from toyworld.stories import Frame
from toyworld.writers import ABOUT
from toyworld.writers.base import VERSION, Job
from toyworld.writers.stories import PLACES, told_by

from ..document import Image
from ..tasks import Sample, Task

SHOWN = ("coco_karpathy", "flickr30k", "nocaps", "image2paragraph")  # tasks that describe the scene they are shown
DRAWN = ("coco", "lncoco", "ade20k", "vist", "pororo", "flintstones")  # tasks that draw scenes
NUMBERS = 1_000_000  # images of a split are numbered from a multiple of this on


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
    return "scene_captions" if name in SHOWN else "scene_images" if name in DRAWN else ""


def shown_scenes(samples: Sequence[Sample], about: dict[str, Any]) -> dict[str, Scene]:
    """What is in the images that samples show, by sample.

    Raises:
        ValueError: an image has no number.
    """
    job = _job(about)
    return {sample.id: _scene(job, str(_given(sample))) for sample in samples}


def drawn_scenes(samples: Sequence[Sample], about: dict[str, Any]) -> dict[tuple[str, int], Scene | Frame]:
    """What the images are to show that samples ask for, by sample and slot; of stories, with what their texts tell.

    Raises:
        ValueError: an image has no number.
    """
    job = _job(about)
    found: dict[tuple[str, int], Scene | Frame] = {}
    for sample in samples:
        if "drawn" in sample.meta:
            found |= {(sample.id, slot): _frame(job, name) for slot, name in enumerate(sample.meta["drawn"])}
        else:
            photo = sample.reference["photo"] if isinstance(sample.reference, dict) else sample.reference[0]
            found[sample.id, 0] = _scene(job, str(photo))
    return found


def _job(about: dict[str, Any]) -> Job:
    return Job(int(about["count"]), about["split"], int(about["seed"]), int(about["size"]))


def _given(sample: Sample) -> Any:
    return next(s.source for s in sample.document.segments if isinstance(s, Image) and s.source is not None)


def _scene(job: Job, image: str) -> Scene:
    return job.scene((_number(image) - 1) % NUMBERS)[0]


def _frame(job: Job, image: str) -> Frame:
    number, place = divmod(_number(image), PLACES)
    return told_by(job, (number - 1) % NUMBERS)[0].frames[place]


def _number(image: str) -> int:
    found = re.search(r"\d+$", Path(image).stem)
    if found is None:
        raise ValueError(f"the toy world numbers its images, but '{Path(image).name}' has no number")
    return int(found[0])
