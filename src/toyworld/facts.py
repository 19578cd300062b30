"""What is known beside the references if the files of a task are the toy world's: the scenes themselves.

`toyworld.json`, which lies beside the data, says what they were drawn from, and an image's name says which it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_interleaved.document import Image
from mm_interleaved.io import InputError, read_json
from mm_interleaved.tasks import Sample, Task
from mm_interleaved.tasks.facts import Facts

from .scene import Scene
from .stories import Frame
from .worlds import BASE, WORLDS, world_of
from .writers import ABOUT
from .writers.base import VERSION, Job
from .writers.stories import PLACES, story_of

SHOWN = ("coco_karpathy", "flickr30k", "nocaps", "image2paragraph")  # tasks that describe the scene they are shown
DRAWN = ("coco", "lncoco", "ade20k", "vist", "pororo", "flintstones")  # tasks that draw scenes
NUMBERS = 1_000_000  # images of a split are numbered from a multiple of this on


def find(task: Task) -> Facts | None:
    """Return what the toy world wrote of a task's files; None: they are not its, or of another version."""
    source = task.source()
    for folder in (source.annotations, source.annotations.parent, source.images.root, source.images.root.parent):
        path = folder / ABOUT
        if path.is_file():
            try:
                about = read_json(path, dict)
            except InputError:
                return None
            if about.get("toyworld") != VERSION or world_of(about) not in WORLDS:
                return None
            job = Job(int(about["count"]), about["split"], int(about["seed"]), int(about["size"]), world_of(about))
            name = task.kind.name
            metrics = ("scene_captions",) if name in SHOWN else ("scene_images",) if name in DRAWN else ()
            return Facts("the toy world" if job.world_name == BASE else f"the {job.world_name} toy world", metrics, job)
    return None


def shown_scenes(samples: Sequence[Sample], facts: Facts | None) -> dict[str, Scene]:
    """Return what is in the images that samples show, by sample.

    Raises:
        ValueError: the files are not the toy world's, or an image has no number.
    """
    job = _job(facts)
    return {sample.id: _scene(job, str(_given(sample))) for sample in samples}


def drawn_scenes(samples: Sequence[Sample], facts: Facts | None) -> dict[tuple[str, int], Scene | Frame]:
    """Return what the images are to show that samples ask for, by sample and slot; of stories, with their texts.

    Raises:
        ValueError: the files are not the toy world's, or an image has no number.
    """
    job = _job(facts)
    found: dict[tuple[str, int], Scene | Frame] = {}
    for sample in samples:
        if "generated" in sample.meta:
            found |= {(sample.id, slot): _frame(job, name) for slot, name in enumerate(sample.meta["generated"])}
        else:
            photo = sample.reference["photo"] if isinstance(sample.reference, dict) else sample.reference[0]
            found[sample.id, 0] = _scene(job, str(photo))
    return found


def _job(facts: Facts | None) -> Job:
    if facts is None or not isinstance(facts.data, Job):
        raise ValueError("the files of the task are not the toy world's, whose scenes are known")
    return facts.data


def _given(sample: Sample) -> Any:
    return next(s.source for s in sample.document.segments if isinstance(s, Image) and s.source is not None)


def _scene(job: Job, image: str) -> Scene:
    return job.scene((_number(image) - 1) % NUMBERS)[0]


def _frame(job: Job, image: str) -> Frame:
    number, place = divmod(_number(image), PLACES)
    return story_of(job, (number - 1) % NUMBERS)[0].frames[place]


def _number(image: str) -> int:
    found = re.search(r"\d+$", Path(image).stem)
    if found is None:
        raise ValueError(f"the toy world numbers its images, but '{Path(image).name}' has no number")
    return int(found[0])
