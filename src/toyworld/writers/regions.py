"""Boxes: RefCOCO's expressions, regions of Visual Genome with captions and questions, GRIT's captions with boxes.

refcoco_val.jsonl, refcoco+_val.jsonl, refcocog_val.jsonl, train2014/COCO_train2014_....jpg
val.json, vgvqa_val.jsonl, images/....jpg
train.jsonl, train_grounding.jsonl, images/....jpg
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..draw import boxes
from ..language import grounded, referring, region_question
from .base import Format, Job, json_lines, write_image, write_json

EXPRESSIONS = ("refcoco", "refcoco+", "refcocog")


def write_refcoco(job: Job, indices: range, folder: Path) -> list[dict[str, Any]]:
    """Images; returns an expression for each of the three sets."""
    found = []
    for index in indices:
        scene, rng = job.scene(index)
        name = f"COCO_train2014_{job.number(index):012d}.jpg"
        write_image(job, scene, folder / "train2014" / name)
        found_boxes = job.world.boxes(scene, job.size)
        meant = {name: job.world.referring(scene, rng) for name in EXPRESSIONS}
        found.append({key: {"image": name, "bbox": list(found_boxes[said.index]), "sent": said.text}
                      for key, said in meant.items()})  # fmt: skip
    return found


def finish_refcoco(job: Job, results: list[list[dict[str, Any]]], folder: Path) -> None:
    """A file for each set; the first two have two parts to test on."""
    samples = [sample for batch in results for sample in batch]
    for name in EXPRESSIONS:
        parts = {job.split: samples}
        if job.split == "test" and name != "refcocog":
            half = (len(samples) + 1) // 2
            parts = {"testA": samples[:half], "testB": samples[half:] or samples[:half]}
        for part, chosen in parts.items():
            text = json_lines([sample[name] for sample in chosen])
            (folder / f"{name}_{part}.jsonl").write_text(text, encoding="utf-8")


def write_vg(job: Job, indices: range, folder: Path) -> list[dict[str, Any]]:
    """Images; returns a region's caption and a question about it."""
    found = []
    for index in indices:
        scene, rng = job.scene(index)
        name = f"{job.number(index)}.jpg"
        write_image(job, scene, folder / "images" / name)
        said = referring(scene, rng)
        region = {"image": name, "bbox": list(boxes(scene, job.size)[said.index])}
        asked = region_question(scene, said.index, rng)
        found.append({"caption": {"image_id": job.number(index), **region, "caption": said.text},
                      "question": {**region, "question": asked.question, "answer": asked.answer}})  # fmt: skip
    return found


def finish_vg(job: Job, results: list[list[dict[str, Any]]], folder: Path) -> None:
    """Captions in COCO's form, questions a line each."""
    samples = [sample for batch in results for sample in batch]
    images = [{"id": sample["caption"]["image_id"]} for sample in samples]
    write_json({"images": images, "annotations": [s["caption"] for s in samples]}, folder / f"{job.split}.json")
    text = json_lines([sample["question"] for sample in samples])
    (folder / f"vgvqa_{job.split}.jsonl").write_text(text, encoding="utf-8")


def write_grit(job: Job, indices: range, folder: Path) -> list[dict[str, Any]]:
    """Images; returns a caption with boxes, and a phrase with its box and a confidence."""
    found = []
    for index in indices:
        scene, rng = job.scene(index)
        name = f"{job.number(index):09d}.jpg"
        write_image(job, scene, folder / "images" / name)
        places = boxes(scene, job.size)
        tagged = grounded(scene, [f"({x1},{y1})({x2},{y2})" for x1, y1, x2, y2 in places], rng)
        said = referring(scene, rng)
        sure = round(float(rng.uniform(0.3, 1)), 3)
        found.append({"tagged": {"image": name, "sent": tagged},
                      "phrase": {"image": name, "sent": said.text, "bbox": list(places[said.index]),
                                 "confidence": sure}})  # fmt: skip
    return found


def finish_grit(job: Job, results: list[list[dict[str, Any]]], folder: Path) -> None:
    """A line each."""
    samples = [sample for batch in results for sample in batch]
    for key, name in (("tagged", f"{job.split}.jsonl"), ("phrase", f"{job.split}_grounding.jsonl")):
        (folder / name).write_text(json_lines([s[key] for s in samples]), encoding="utf-8")


FORMATS = (
    Format("refcoco", "expressions and the boxes that they mean, as RefCOCO, RefCOCO+ and RefCOCOg", write_refcoco,
           finish_refcoco, 100),
    Format("vg", "regions with captions and questions, as Visual Genome", write_vg, finish_vg, 100),
    Format("grit", "captions with boxes, as GRIT", write_grit, finish_grit, 100),
)  # fmt: skip
