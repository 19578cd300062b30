"""`gallery.html` of a task: input, prediction and reference of each sample, the lowest score first.

The page is one file; small copies of its images are in `gallery/` in the same folder.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from jinja2 import Environment, PackageLoader

from ..document import Image, Text
from ..evaluation.predictions import Record
from ..evaluation.scoring import SampleScores, ScoringInputs, TaskResult, main_scores
from ..io import InputError, write_atomic, write_image
from ..io.images import load_image
from ..metrics import Scores
from ..tasks import Sample

GALLERY, IMAGES = "gallery.html", "gallery"
SIDE = 320  # longest side of an image in the gallery, in pixels
BEST_OPTIONS = 5  # how many of the ranked candidate answers are shown


def choose(scores: Scores, ids: Sequence[str], limit: int) -> list[str]:
    """The ids to show, the lowest score first. Above `limit`: half are the lowest, half are spread over the others."""
    ranked = sorted(ids, key=lambda key: scores.get(key, math.inf))
    if len(ranked) <= limit:
        return ranked
    worst = limit // 2 if scores else 0
    others, spread = ranked[worst:], limit - worst
    return ranked[:worst] + [others[i * len(others) // spread] for i in range(spread)]


def write_gallery(given: ScoringInputs, scores: SampleScores, result: TaskResult, limit: int) -> Path | None:
    """Write the page of a task and its images. Returns its path; None: there is nothing to show."""
    if not limit or not given.samples:
        return None
    rows = {s.id: (s, r) for s, r in zip(given.samples, given.records, strict=True)}
    folder = given.folder / IMAGES
    shutil.rmtree(folder, ignore_errors=True)
    value, ranking = main_scores(scores)
    chosen = choose(ranking, list(rows), limit)
    shown = [_entry(number, *rows[key], given, ranking.get(key)) for number, key in enumerate(chosen)]
    environment = Environment(loader=PackageLoader("mm_interleaved.cli"), autoescape=True)
    page = environment.get_template("gallery.html").render(
        name=given.task.name, description=given.task.kind.description, result=result, value=value,
        entries=shown, count=len(rows),
    )  # fmt: skip
    path = given.folder / GALLERY
    write_atomic(path, page)
    return path


def _entry(number: int, sample: Sample, record: Record, given: ScoringInputs, score: float | None) -> dict[str, Any]:
    """The values of a sample for the page's template."""
    folder = given.folder / IMAGES
    asked = []
    for slot, segment in enumerate(sample.document.segments):
        if segment.is_open:
            continue
        if isinstance(segment, Image):
            asked.append({"url": _thumbnail(segment.source, folder / f"{number}_in_{slot}.jpg")})
        else:
            asked.append({"text": segment.text})
    made: list[dict[str, Any]] = []
    if "prediction" in record:
        made = [{"text": record["prediction"]}]
        if record["text"].strip() != record["prediction"]:
            made.append({"text": record["text"], "soft": "as written"})
    elif "images" in record:
        made = [{"url": name} for name in record["images"]]
    elif "scores" in record:
        best = sorted(range(len(record["scores"])), key=lambda i: -record["scores"][i])[:BEST_OPTIONS]
        made = [{"text": sample.options[i], "soft": f"{record['scores'][i]:.2f}"} for i in best]
    words = " ".join([s.text or "" for s in sample.document.segments if isinstance(s, Text)]
                     + [str(part.get("text", "")) for part in made])  # fmt: skip
    return {
        "id": sample.id, "score": score, "asked": asked, "made": made, "right": _right(number, sample, record, folder),
        "words": f"{sample.id} {words}".lower(), "meta": json.dumps(dict(sample.meta), ensure_ascii=False, default=str),
    }  # fmt: skip


def _right(number: int, sample: Sample, record: Record, folder: Path) -> list[dict[str, Any]]:
    """The reference: images, texts or accepted answers."""
    reference = sample.reference
    if reference is None:  # of a phase without published answers
        return []
    if "references" in record:
        return [{"url": name} for name in record["references"]]
    if "images" in record:
        names = [reference["photo"], reference["labels"]] if isinstance(reference, dict) else reference
        return [{"url": _thumbnail(name, folder / f"{number}_true_{i}.jpg")} for i, name in enumerate(names)]
    if "scores" in record:
        relevance = reference["relevance"]
        best = sorted(range(len(relevance)), key=lambda i: -relevance[i])[:BEST_OPTIONS]
        return [{"text": sample.options[i], "soft": f"relevance {relevance[i]:g}"} for i in best if relevance[i]]
    if isinstance(reference, list) and all(isinstance(text, str) for text in reference):
        return [{"text": text, "soft": f"x {reference.count(text)}" if reference.count(text) > 1 else ""}
                for text in dict.fromkeys(reference)]  # fmt: skip
    return [{"text": str(reference)}]


def _thumbnail(source: Any, path: Path) -> str | None:
    """Write a small copy of an image. Returns its relative URL; None: the image can no longer be read."""
    try:
        image = load_image(source)
    except InputError:
        return None
    image.thumbnail((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
    write_image(path, image)
    return f"{IMAGES}/{path.name}"
