"""`gallery.html` of a task: what was asked, made and right, sample by sample, the worst first.

The page is one file; the images that it shows lie beside it in `gallery/`, small.
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
BEST_OPTIONS = 5  # of many candidate answers, how many are shown


def choose(scores: Scores, ids: Sequence[str], limit: int) -> list[str]:
    """Ids to show, the worst first: all, or half of the limit the worst and half spread evenly over the others."""
    ranked = sorted(ids, key=lambda key: scores.get(key, math.inf))
    if len(ranked) <= limit:
        return ranked
    worst = limit // 2 if scores else 0
    others, spread = ranked[worst:], limit - worst
    return ranked[:worst] + [others[i * len(others) // spread] for i in range(spread)]


def write_gallery(given: ScoringInputs, scores: SampleScores, result: TaskResult, limit: int) -> Path | None:
    """Write the page of a task and its images; its path, None if nothing is to be shown."""
    if not limit or not given.samples:
        return None
    rows = {s.id: (s, r) for s, r in zip(given.samples, given.records, strict=True)}
    folder = given.folder / IMAGES
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
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
    """What the page shows of a sample."""
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
    """The reference: images, texts, or the answers that count."""
    reference = sample.reference
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
    """Write a small copy beside the page; its relative URL, None if the image cannot be read any more."""
    try:
        image = load_image(source)
    except InputError:
        return None
    image.thumbnail((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
    write_image(path, image)
    return f"{IMAGES}/{path.name}"
