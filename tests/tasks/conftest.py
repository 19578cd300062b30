"""Toy-world data sets in the official layouts, written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mm_interleaved.tasks import Sample, Task, TaskConfig, make_task
from toyworld.sampling import random_scene, scene_rng
from toyworld.scene import Scene
from toyworld.writers import write_dataset
from toyworld.writers.base import Job

from .official import OFFICIAL

SIZE, COUNT, SEED = 64, 4, 0

# For each task: the toy world's format, and where its images lie.
TOY_FILES = {
    "coco_karpathy": ("coco", ""), "flickr30k": ("flickr30k", "flickr30k-images"), "nocaps": ("nocaps", "images"),
    "image2paragraph": ("image2paragraph", "images"), "vqav2": ("vqav2", ""), "okvqa": ("okvqa", ""),
    "textvqa": ("textvqa", "train_images"), "vizwiz_vqa": ("vizwiz_vqa", ""), "gqa": ("gqa", "images"),
    "visdial": ("visdial", ""), "refcoco": ("refcoco", "train2014"), "refcoco+": ("refcoco", "train2014"),
    "refcocog": ("refcoco", "train2014"), "grit_grounding": ("grit", "images"), "region_caption": ("vg", "images"),
    "region_vqa": ("vg", "images"), "grounded_caption": ("grit", "images"), "coco": ("coco", ""),
    "lncoco": ("lncoco", ""), "ade20k": ("ade20k", ""), "vist": ("vist", "images"), "vist_text": ("vist", "images"),
    "pororo": ("pororo", ""), "flintstones": ("flintstones", ""), "llava_instruct": ("llava", "images"),
    "llava_conversations": ("llava", "images"),
}  # fmt: skip
FILES = TOY_FILES | {name: (f"official {name}", images) for name, (_, images, _) in OFFICIAL.items()}
PHASES = {
    "flickr30k": "test", "ade20k": "validation", "grit_grounding": "train", "llava_instruct": "train",
    "llava_conversations": "train",
} | {name: phase for name, (_, _, phase) in OFFICIAL.items()}  # fmt: skip

Written = Callable[..., Path]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The folder of a format's data; shared, leave it alone."""
    folders: dict[tuple[str, str], Path] = {}

    def write(form: str, split: str = "val") -> Path:
        if (form, split) not in folders:
            folder = tmp_path_factory.mktemp("toy") / form
            if form.startswith("official "):
                OFFICIAL[form.removeprefix("official ")][0](folder)
                folders[form, split] = folder
                return folder
            write_dataset(form, folder, Job(COUNT, split, SEED, SIZE))  # type: ignore[arg-type]
            folders[form, split] = folder
        return folders[form, split]

    return write


@pytest.fixture(scope="session")
def toy_task(written: Written) -> Callable[..., Task]:
    """A task on toy data, with whatever settings."""

    def make(name: str, split: str = "", **settings: object) -> Task:
        form, images = FILES[name]
        phase = settings.pop("phase", "") or PHASES.get(name, split or "val")
        folder = written(form, split or (phase if phase in ("train", "test") and name != "flickr30k" else "val"))
        paths = {"images": str(folder / images), "annotations": str(folder)} | settings
        return make_task(TaskConfig(name, phase=str(phase), **paths))  # type: ignore[arg-type]

    return make


def scene(index: int, split: str = "val") -> Scene:
    """What image number `index` of most formats shows."""
    return random_scene(scene_rng(SEED, split, index), split=split)  # type: ignore[arg-type]


def first(task: Task) -> Sample:
    return next(task.samples())
