"""Images from captions: COCO and Localized Narratives of COCO (docs/data_formats.md, "Text to image")."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..document import Image
from ..generation.settings import GenerationSettings, ImageSettings
from .base import Item, TaskType, each, grouped, usable
from .files import Source, checked, entries, get, line_entries, read_json, strings

PROMPT = "{caption}"
SAMPLES = 30_000


def read_coco(source: Source) -> Iterator[Item]:
    """The first caption of every image, in lower case, and in training any of its captions.

    The original evaluates the first 30,000.
    """
    path = source.file(f"annotations/captions_{source.phase}2014.json")
    data = checked(read_json(path), dict, str(path))
    captions, odd = grouped(entries(data.get("annotations"), f"{path}, 'annotations'"), "image_id", int)

    def make(where: str, record: dict[str, Any], index: int) -> Iterator[Item]:
        number = get(record, "id", int, where)
        image, problem = source.images.find(f"{source.phase}2014/{get(record, 'file_name', str, where)}")
        found = captions.get(number, [(f"{where}, captions of image {number}", {"caption": ""})])
        texts = [get(record, "caption", str, place).lower().strip() for place, record in found]
        strings(texts[:1], found[0][0])
        item = _item(str(number), texts[0], image, problem, found[0][0])
        choices = [text for text in texts if text]

        def vary(rng: np.random.Generator) -> Item:
            return replace(item, fields={"caption": choices[int(rng.integers(len(choices)))]})

        yield replace(item, vary=vary)

    yield from each(entries(data.get("images"), f"{path}, 'images'"), make)
    yield from odd


def read_narratives(source: Source) -> Iterator[Item]:
    """Every narrative; for evaluation more sampled with replacement until there are `limit`, or 30,000.

    The weight of a narrative is 1 / (number of narratives of its image). The original samples without a seed,
    separately in each process.
    """
    path = source.file(f"coco_{source.phase}_captions.jsonl")
    found, odd = usable(line_entries(path), _narrative)
    yield from odd
    if not found:
        return
    numbers = [number for _, number, _ in found]
    many = Counter(numbers)
    weights = np.array([1 / many[number] for number in numbers])
    extra = 0 if source.phase == "train" else max((source.limit or SAMPLES) - len(found), 0)
    repeated = np.random.default_rng(source.seed).choice(len(found), extra, p=weights / weights.sum())
    for index, which in enumerate([*range(len(found)), *repeated.tolist()]):
        where, number, text = found[int(which)]
        image, problem = source.images.find(f"{source.phase}2017/{number.zfill(12)}.jpg")
        yield _item(str(index), text, image, problem, where)


def _narrative(where: str, record: dict[str, Any]) -> tuple[str, str, str]:
    """The place of a narrative, the number of its image, and its text."""
    text = strings([get(record, "caption", str, where)], f"{where}, 'caption'")[0].strip()
    return where, get(record, "image_id", str, where), text


def _item(number: str, text: str, image: Any, problem: str, place: str) -> Item:
    return Item(number, {"caption": text}, [str(image)], [Image(image)], meta={"caption": text}, problem=problem,
                place=place)  # fmt: skip


TASKS = (
    TaskType("coco", "images from COCO captions", read_coco, makes="image", prompt=PROMPT,
             metrics=("fid", "text_similarity"), select="clip",
             settings=GenerationSettings(image=ImageSettings(250, 3.5, num_candidates=8)),
             phases=("val", "train"), images="coco", annotations="coco",
             obtain="Get annotations and images of 2014 from cocodataset.org"),
    TaskType("lncoco", "images from Localized Narratives of COCO", read_narratives, makes="image", prompt=PROMPT,
             metrics=("fid", "text_similarity"), settings=GenerationSettings(image=ImageSettings(250, 3.5)),
             phases=("val", "train"), images="coco", annotations="lncoco",
             obtain="Get coco_val_captions.jsonl (or coco_train_captions.jsonl) of Localized Narratives, and COCO's "
             "images of 2017"),
)  # fmt: skip
