"""Conversion of official files to the formats that tasks read (docs/data_formats.md, "Conversion").

    lines = prepare("textvqa", source=Path("downloads/textvqa"), root=Path("datasets"), phase="val")

Files are written atomically and replace existing ones.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..io import InputError, write_atomic, write_image, write_json, write_json_lines
from ..io.images import load_image
from .ade20k import color_maps
from .base import TaskType
from .files import checked, get, read_json, records, strings, trailing_number
from .pickles import read_pickle
from .stories import FLINTSTONES_FILES, FRAME

Lines = list[str]


@dataclass(frozen=True)
class Job:
    """The folders of a conversion.

    Attributes:
        task: name of the task.
        source: folder of the official files.
        images, annotations: folders that the task reads.
        phase: part of the data set.
    """

    task: str
    source: Path
    images: Path
    annotations: Path
    phase: str

    def file(self, *names: str) -> Path:
        """The first existing official file of these names.

        Raises:
            InputError: none exists.
        """
        for name in names:
            if (self.source / name).is_file():
                return self.source / name
        raise InputError(f"task '{self.task}' is made of {' or '.join(names)}, which is not there", str(self.source),
                         CONVERTERS[self.task].obtain)  # fmt: skip


@dataclass(frozen=True)
class Converter:
    """A conversion of the files of a task.

    Attributes:
        description: its input and output, in one line.
        convert: the function; yields lines that state what was written.
        obtain: where to get the official files.
        images: whether it makes images, too.
    """

    description: str
    convert: Callable[[Job], Lines]
    obtain: str
    images: bool = False


def command(kind: TaskType, root: str, phase: str) -> str:
    """The command line that converts the official files of a task; "": they need no conversion."""
    if kind.name not in CONVERTERS:
        return ""
    return shlex.join(["mmi", "data", "prepare", kind.name, "--source", "FOLDER", "--root", root, "--phase", phase])


def prepare(kind: TaskType, source: Path, root: Path, phase: str) -> Lines:
    """Convert the official files of a task. Yields lines that state what was written.

    Args:
        kind: the task.
        source: folder of the official files.
        root: folder of the documented tree.
        phase: part of the data set; "": the task's default.

    Raises:
        InputError: the task's files need no conversion or have no converter, or the official files cannot be used.
    """
    if kind.name not in CONVERTERS:
        raise InputError(f"task '{kind.name}' reads its files as they are; there is nothing to convert", "",
                         f"{kind.obtain}, then see: mmi data check {kind.name}")  # fmt: skip
    if phase and phase not in kind.phases:
        raise InputError(f"there is no phase '{phase}'", f"task '{kind.name}'", f"Phases are {', '.join(kind.phases)}")
    if not source.is_dir():
        why = "is a file" if source.is_file() else "does not exist"
        raise InputError(f"this folder of official files {why}", str(source), CONVERTERS[kind.name].obtain)
    job = Job(kind.name, source, root / kind.images, root / kind.annotations, phase or kind.phases[0])
    return CONVERTERS[kind.name].convert(job)


# ---- captions


def flickr30k(job: Job) -> Lines:
    """Karpathy's `dataset_flickr30k.json` to `test1k.token.coco_format`, and of the other splits `{phase}.token...`."""
    path = job.file("dataset_flickr30k.json")
    data = checked(read_json(path), dict, str(path))
    images, annotations = [], []
    for where, record in records(data.get("images"), f"{path}, 'images'"):
        if get(record, "split", str, where) != job.phase:
            continue
        name = get(record, "filename", str, where)
        number = trailing_number(name, where)
        images.append({"id": number, "file_name": name})
        for place, sentence in records(record.get("sentences"), f"{where}, 'sentences'"):
            text = get(sentence, "raw", str, place)
            annotations.append({"id": len(annotations), "image_id": number, "caption": text})
    target = job.annotations / f"{'test1k' if job.phase == 'test' else job.phase}.token.coco_format"
    write_json(target, {"images": images, "annotations": annotations})
    return [f"{target}: {len(images)} images, {len(annotations)} captions"]


def image2paragraph(job: Job) -> Lines:
    """Krause's `paragraphs_v1.json` to COCO's format; the lists of splits are copied."""
    path = job.file("paragraphs_v1.json")
    annotations, numbers = [], {}
    for where, record in records(read_json(path), str(path)):
        number = get(record, "image_id", int, where)
        numbers[number] = None  # a few images have two paragraphs
        annotations.append({"id": len(annotations), "image_id": number, "url": get(record, "url", str, where),
                            "caption": get(record, "paragraph", str, where).strip()})  # fmt: skip
    target = job.annotations / "annotations" / "paragraphs_coco.json"
    write_json(target, {"images": [{"id": number} for number in numbers], "annotations": annotations})
    lines = [f"{target}: {len(annotations)} paragraphs of {len(numbers)} images"]
    for phase in ("train", "val", "test"):
        split = job.file(f"{phase}_split.json")
        chosen = checked(read_json(split), list, str(split))
        write_json(job.annotations / "annotations" / split.name, chosen)
        lines.append(f"{job.annotations / 'annotations' / split.name}: {len(chosen)} images")
    return lines


# ---- questions


def textvqa(job: Job) -> Lines:
    """TextVQA 0.5.1 (one file) to VQA's two files. The test has no answers, and so no second file."""
    answered = job.phase != "test"
    path = job.file(f"TextVQA_0.5.1_{job.phase}.json")
    data = checked(read_json(path), dict, str(path))
    questions, annotations = [], []
    for where, record in records(data.get("data"), f"{path}, 'data'"):
        number, image = get(record, "question_id", int, where), get(record, "image_id", str, where)
        people = strings(record.get("answers"), f"{where}, 'answers'") if answered else []
        asked = get(record, "question", str, where)
        questions.append({"question_id": number, "image_id": image, "image": f"{image}.jpg", "question": asked})
        answers = [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(people, 1)]
        annotations.append({"question_id": number, "image_id": image, "answers": answers, "question_type": "textvqa",
                            "answer_type": "other"})  # fmt: skip
    about = {"info": {"description": "TextVQA 0.5.1", "version": "0.5.1"}, "task_type": "Open-Ended",
             "data_type": "textvqa", "data_subtype": job.phase, "license": {"name": "CC BY 4.0"}}  # fmt: skip
    asked_file = job.annotations / f"textvqa_{job.phase}_questions.json"
    told_file = job.annotations / f"textvqa_{job.phase}_annotations.json"
    write_json(asked_file, {**about, "questions": questions})
    if not answered:
        return [f"{asked_file}: {len(questions)} questions"]
    write_json(told_file, {**about, "annotations": annotations})
    return [f"{asked_file}: {len(questions)} questions", f"{told_file}: {len(annotations)} times ten answers"]


# ---- boxes


def refer(job: Job) -> Lines:
    """`refs(unc).p` or `refs(umd).p` with `instances.json` to a JSON-lines file for each split."""
    folder = job.source / job.task if (job.source / job.task).is_dir() else job.source
    found = Job(job.task, folder, job.images, job.annotations, job.phase)
    refs_file = found.file("refs(umd).p" if job.task == "refcocog" else "refs(unc).p")
    instances = found.file("instances.json")
    boxes, names = _instances(instances)
    lines: dict[str, list[dict[str, Any]]] = {}
    for index, ref in enumerate(checked(read_pickle(refs_file), list, str(refs_file))):
        where = f"{refs_file}, item {index}"
        record = checked(ref, dict, where)
        region, image = get(record, "ann_id", int, where), get(record, "image_id", int, where)
        if region not in boxes or image not in names:
            raise InputError(f"region {region} or image {image} is not in {instances}", where,
                             "Take both files from one release")  # fmt: skip
        x, y, width, height = boxes[region]
        bbox = [x, y, x + width, y + height]
        for place, sentence in records(record.get("sentences"), f"{where}, 'sentences'"):
            line = {"image": names[image], "bbox": bbox, "sent": get(sentence, "sent", str, place)}
            lines.setdefault(get(record, "split", str, where), []).append(line)
    said = []
    for split, written in sorted(lines.items()):
        target = job.annotations / f"{job.task}_{split}.jsonl"
        write_json_lines(target, written)
        said.append(f"{target}: {len(written)} expressions")
    return said


def _instances(path: Path) -> tuple[dict[int, list[float]], dict[int, str]]:
    """Boxes (x, y, width, height) by region, and files by image."""
    data = checked(read_json(path), dict, str(path))
    boxes, names = {}, {}
    for where, record in records(data.get("annotations"), f"{path}, 'annotations'"):
        sides = [checked(v, float, f"{where}, 'bbox'[{i}]") for i, v in enumerate(get(record, "bbox", list, where))]
        if len(sides) != 4:
            raise InputError(f"a box has four numbers, not {len(sides)}", f"{where}, 'bbox'", "Fetch the file again")
        boxes[get(record, "id", int, where)] = sides
    for where, record in records(data.get("images"), f"{path}, 'images'"):
        names[get(record, "id", int, where)] = get(record, "file_name", str, where)
    return boxes, names


# ---- images


def ade20k(job: Job) -> Lines:
    """Label maps to coloured maps. There is no official file of captions."""
    count = color_maps(job.source, job.phase)
    lines = [f"{job.source / 'annotations_with_color' / job.phase}: {count} coloured maps"]
    captions = job.source / f"{job.phase}.json"
    if not captions.is_file():
        lines.append(f"still missing: {captions}, a list of {{image_id, caption}}; the original used a captioner")
    return lines


def vist(job: Job) -> Lines:
    """`{phase}.story-in-sequence.json`, a list of single turns, to turns by story; images of any format to PNG files.

    The images may lie in folders of up to two levels. Stories with a missing image are left out.
    """
    name = f"{job.phase}.story-in-sequence.json"
    path = job.file(name, f"sis/{name}")
    data = checked(read_json(path), dict, str(path))
    stories: dict[str, list[dict[str, Any]]] = {}
    for index, value in enumerate(checked(data.get("annotations"), list, f"{path}, 'annotations'")):
        where = f"{path}, 'annotations'[{index}]"
        for _, turn in records(value, where):
            entry = {"sequence_index": get(turn, "worker_arranged_photo_order", int, where),
                     "image_id": get(turn, "photo_flickr_id", str, where),
                     "caption": get(turn, "original_text", str, where)}  # fmt: skip
            stories.setdefault(get(turn, "story_id", str, where), []).append(entry)
    images = job.images / f"{job.phase}_images"
    needed = dict.fromkeys(turn["image_id"] for turns in stories.values() for turn in turns)
    found = {path.stem: path for level in ("*/*/*", "*/*", "*") for path in sorted(job.source.glob(level))
             if path.suffix.lower() in (".gif", ".jpeg", ".jpg", ".png")}  # fmt: skip
    there = {name for name in needed if _as_png(found.get(name), images / f"{name}.png")}
    whole = {name: turns for name, turns in stories.items() if all(t["image_id"] in there for t in turns)}
    if not whole:
        raise InputError(f"no story has all its images, of {len(stories)}", str(job.source),
                         f"Put the images into {job.phase}_images/ there, named by their Flickr number")  # fmt: skip
    target = job.annotations / "annotations" / f"{job.phase}_formatted_filtered.json"
    write_json(target, {"annotations": whole})
    left = len(stories) - len(whole)
    return [f"{target}: {len(whole)} stories; {left} left out, since images are missing",
            f"{images}: {len(there)} of {len(needed)} images"]  # fmt: skip


def _as_png(path: Path | None, target: Path) -> bool:
    """Convert an image to PNG, unless the PNG exists. Returns whether the PNG exists now."""
    if target.is_file():
        return True
    if path is None:
        return False
    try:
        write_image(target, load_image(path))
    except InputError:
        return False
    return True


def flintstones(job: Job) -> Lines:
    """Videos, `video_frames_sampled/*.npy` of frames [T, 128, 128, 3], to vertical strips as PNG.

    The three files of annotations are copied.
    """
    videos = sorted((job.source / "video_frames_sampled").glob("*.npy"))
    if not videos:
        raise InputError("there are no videos (video_frames_sampled/*.npy)", str(job.source),
                         CONVERTERS[job.task].obtain)  # fmt: skip
    lines = []
    for path in [job.file(name) for name in FLINTSTONES_FILES]:
        copy = job.annotations / path.name
        if not (copy.exists() and copy.samefile(path)):
            write_atomic(copy, path.read_bytes())
        lines.append(f"{copy}: {copy.stat().st_size:,} bytes")
    target = job.images / "video_frames_sampled_png"
    for path in videos:
        if (target / f"{path.stem}.png").is_file():
            continue
        try:
            frames = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise InputError(f"not an array of frames: {error}", str(path), "Fetch it again") from None
        if frames.ndim != 4 or frames.shape[1:] != (FRAME, FRAME, 3) or frames.dtype != np.uint8:
            raise InputError(f"frames must be uint8 [T, {FRAME}, {FRAME}, 3], not {frames.dtype} {list(frames.shape)}",
                             str(path), "Fetch it again")  # fmt: skip
        write_image(target / f"{path.stem}.png", PIL.Image.fromarray(frames.reshape(-1, FRAME, 3)))
    return [*lines, f"{target}: {len(videos)} strips"]


_REFER = "Get refcoco.zip, refcoco+.zip and refcocog.zip of the refer toolbox (lichengunc/refer on GitHub)"
CONVERTERS: dict[str, Converter] = {
    "flickr30k": Converter("dataset_flickr30k.json to COCO's form", flickr30k,
                           "Get Karpathy's splits (caption_datasets.zip)"),
    "image2paragraph": Converter("paragraphs_v1.json to COCO's form", image2paragraph,
                                 "Get paragraphs_v1.json and the three lists of splits from the page of Krause et al."),
    "textvqa": Converter("TextVQA_0.5.1_*.json to VQA's two files", textvqa, "Get TextVQA 0.5.1 from textvqa.org"),
    "refcoco": Converter("refs(unc).p to JSON lines", refer, _REFER),
    "refcoco+": Converter("refs(unc).p to JSON lines", refer, _REFER),
    "refcocog": Converter("refs(umd).p to JSON lines", refer, _REFER),
    "ade20k": Converter("label maps to coloured maps, in place", ade20k,
                        "Get ADEChallengeData2016 and give its folder", images=True),
    "vist": Converter("*.story-in-sequence.json to turns by story, images to PNG", vist,
                      "Get VIST's stories in sequence (SIS) and its images", images=True),
    "vist_text": Converter("*.story-in-sequence.json to turns by story, images to PNG", vist,
                           "Get VIST's stories in sequence (SIS) and its images", images=True),
    "flintstones": Converter("videos (.npy) to strips of frames (.png); copies the annotations", flintstones,
                             "Get FlintstonesSV as StoryDALL-E publishes it", images=True),
}  # fmt: skip
