"""Checks the files of a task: whether they exist and are well formed, and the number of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..document import Image, Segment
from ..io import FileSlice, InputError
from ..io.images import load_image, open_image
from .base import NO_IMAGES, Sample, Task
from .files import NO_FILE
from .prepare import CONVERTERS, command
from .stories import FRAME

NAMED = 20  # problems of one kind that are listed
DECODED = 100  # images that are decoded; of the others only the header is read

EXPECTED: dict[tuple[str, str], int | None] = {
    ("coco_karpathy", "test"): 5_000, ("coco_karpathy", "train"): 566_747, ("flickr30k", "test"): 1_000,
    ("nocaps", "val"): 4_500, ("textcaps", "train"): 21_953, ("image2paragraph", "test"): 2_489,
    ("vqav2", "val"): 214_354, ("vqav2", "train"): 443_757, ("okvqa", "val"): 5_046, ("textvqa", "val"): 5_000,
    ("vizwiz_vqa", "val"): 4_319, ("gqa", "testdev"): 12_578, ("gqa", "val"): 132_062, ("gqa", "train"): 943_000,
    ("chartqa", "train"): 28_299, ("chartqa", "test"): 2_500, ("docvqa", "train"): 39_463, ("docvqa", "val"): 5_349,
    ("docvqa", "test"): 5_188, ("infovqa", "train"): 23_946, ("infovqa", "val"): 2_801,
    ("dvqa", "train"): 2_325_316, ("dvqa", "val_easy"): 580_557, ("dvqa", "val_hard"): 581_321,
    ("visdial", "val"): 2_064, ("refcoco", "train"): 120_624, ("refcoco", "val"): 10_834,
    ("refcoco", "testA"): 5_657, ("refcoco", "testB"): 5_095, ("coco", "val"): 40_504, ("lncoco", "val"): 8_573,
    ("flickr30k_entities", "test"): 1_000, ("flickr30k_entities", "val"): 1_000, ("llava_665k", "train"): 665_298,
    # not known
    ("refcoco+", "val"): None, ("refcocog", "val"): None, ("vist", "test"): None, ("pororo", "test"): None,
    ("flintstones", "test"): None, ("st_vqa", "train"): None, ("est_vqa", "train"): None, ("ocrvqa", "test"): None,
}  # fmt: skip
"""Numbers of records of the official sets as published; filtered or extended sets have other numbers."""


@dataclass
class TaskCheck:
    """The result of a check.

    Attributes:
        samples: number of samples.
        records: number of different records; some records give several samples.
        images: number of different image files.
        frames: number of frames in the files of clips.
        missing: number of samples that cannot be used, since an image is missing or a record is malformed.
        unreadable: number of image files that are not images.
        expected: number of records of the official set; None: unknown, or a limit was set.
        problems: messages with places; a few of each kind.
        fix: where to get the files.
        command: the command line that converts the official files, if that would help; "": it would not.
    """

    samples: int = 0
    records: int = 0
    images: int = 0
    frames: int = 0
    missing: int = 0
    unreadable: int = 0
    expected: int | None = None
    problems: list[str] = field(default_factory=list)
    fix: str = ""
    command: str = ""

    @property
    def good(self) -> bool:
        """Whether every sample can be evaluated. Does not compare the number of records."""
        return not self.problems


def check_task(task: Task, advance: Callable[[], None] = lambda: None) -> TaskCheck:
    """Read all annotations of a task and the header of every image, and decode some images.

    Args:
        task: the task to check.
        advance: called after each sample.
    """
    phase = task.config.phase or task.kind.phases[0]
    expected = EXPECTED.get((task.kind.name, phase)) if task.config.limit is None else None
    found = TaskCheck(expected=expected, fix=task.kind.obtain)
    seen: dict[Path | FileSlice, str] = {}
    records: set[str] = set()
    kinds: set[str] = set()
    try:
        for sample in task.samples():
            found.samples += 1
            records.add(sample.document.place or sample.id)
            _check_sample(sample, found, seen)
            advance()
    except InputError as error:
        errors = [error, *(_annotation_errors(task) if error.kind == NO_IMAGES else ())]
        found.problems[:0] = [str(error) for error in errors]
        kinds = {error.kind for error in errors}
    found.records = len(records)
    converter = CONVERTERS.get(task.kind.name) if task.config.annotations is None else None
    if converter and (NO_FILE in kinds or (converter.images and (NO_IMAGES in kinds or found.missing))):
        found.command = command(task.kind, task.config.root, phase)
    found.images = len(seen)
    for number, path in enumerate(sorted((path for path, problem in seen.items() if not problem), key=str)):
        if number % max(len(seen) // DECODED, 1) == 0:
            try:
                load_image(path)
            except InputError as error:
                _count_unreadable(found, str(error))
    return found


def _annotation_errors(task: Task) -> list[InputError]:
    """What is wrong with the annotations, of which the first record is read."""
    try:
        next(task.kind.read(task.source(need_images=False)), None)
    except InputError as error:
        return [error]
    return []


def _check_sample(sample: Sample, found: TaskCheck, seen: dict[Path | FileSlice, str]) -> None:
    if sample.problem:
        found.missing += 1
        if found.missing <= NAMED:
            found.problems.append(f"sample {sample.id}: {sample.problem}")
    segments: list[Segment] = [*sample.document.segments, *sample.answer]
    images = [s.source for s in segments if isinstance(s, Image) and isinstance(s.source, Path | FileSlice)]
    clips: Sequence[Path] = sample.meta.get("clips", ())
    for path in (*images, *clips):
        if path in seen:
            continue
        seen[path] = ""
        if sample.problem and isinstance(path, Path) and not path.is_file():
            seen[path] = sample.problem
            continue
        try:
            image = open_image(path)
        except InputError as error:
            seen[path] = str(error)
            _count_unreadable(found, str(error))
        else:
            found.frames += image.height // FRAME if path in clips else 0


def _count_unreadable(found: TaskCheck, problem: str) -> None:
    found.unreadable += 1
    if found.unreadable <= NAMED:
        found.problems.append(problem)
