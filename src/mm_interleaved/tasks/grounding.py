"""Boxes and regions: RefCOCO, RefCOCO+, RefCOCOg, and data sets of regions.

Files and prompts: docs/data_formats.md, "Boxes and regions".

Texts state boxes in thousandths of the image's sides, `(012,045)(678,999)`, and carry them as data, so that a transform
of the image can move them. Images are stretched to squares, not cropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..document import Box, Text
from ..io import InputError
from ..io.images import upright_size
from .base import Item, TaskType, each, given
from .files import Source, box, checked, entries, get, line_entries, read_json, strings

GROUNDING = "{image}Provide the bounding box coordinate of the region this sentence describes. {caption}<box>"
REFERRING = "{image}Provide a short description for this <ref>region</ref><box>{box}</box>."
REGION_VQA = "{image}Answer this question according to the <ref>region</ref><box>{box}</box>. {question}"
GROUNDED_CAPTION = "{image}Generate the caption with grounding."
_TAGGED = re.compile(r"<box>\((-?[\d.]+),(-?[\d.]+)\)\((-?[\d.]+),(-?[\d.]+)\)</box>")


def thousandths(box: Box) -> list[int]:
    """The box as integers from 0 to 999, as its text states them."""
    return [int(side) for side in re.findall(r"\d+", str(box))]


@lru_cache(maxsize=100_000)
def _size(path: Path) -> tuple[int, int]:
    return upright_size(path)


def _region(source: Source, record: dict[str, Any], where: str) -> tuple[Path, str, tuple[int, int], Box]:
    """The image of a record, why it cannot be used, its size, and the region."""
    pixels = box(record.get("bbox"), f"{where}, 'bbox'")
    image, problem, size = _image(source, record, where)
    return image, problem, size, Box(0, 0, 1, 1) if problem else Box.from_pixels(pixels, size)


def _image(source: Source, record: dict[str, Any], where: str) -> tuple[Path, str, tuple[int, int]]:
    image, problem = source.images.find(get(record, "image", str, where))
    size = (1, 1)
    if not problem:
        try:
            size = _size(image)
        except InputError as error:
            problem = str(error)
    return image, problem, size


def read_expressions(source: Source, name: str) -> Iterator[Item]:
    """JSON lines of {image, bbox in pixels, sent, optional confidence}; those of low confidence are skipped."""
    least = threshold(source)

    def make(where: str, record: dict[str, Any], index: int) -> Iterator[Item]:
        if "confidence" in record and get(record, "confidence", float, where) < least:
            return
        caption = strings([get(record, "sent", str, where)], f"{where}, 'sent'")[0]
        image, problem, size, region = _region(source, record, where)
        yield Item(str(index), {"image": given(image), "caption": caption}, thousandths(region),
                   [Text.of(region, "</box>", attached=True)],
                   meta={"caption": caption, "width": size[0], "height": size[1]}, problem=problem,
                   place=where)  # fmt: skip

    return each(line_entries(source.file(name.format(phase=source.phase))), make)


def threshold(source: Source) -> float:
    """The least confidence of a box that is used, from the option `confidence`.

    Raises:
        InputError: it is no number.
    """
    text = source.options.get("confidence") or "0"
    try:
        return float(text)
    except ValueError:
        raise InputError(f"option 'confidence' must be a number, not '{text}'", f"task '{source.task}'") from None


def read_regions(source: Source) -> Iterator[Item]:
    """{annotations: [{image_id, image, caption, bbox}]}; an image may have several regions."""
    path = source.file(f"{source.phase}.json")
    data = checked(read_json(path), dict, str(path))

    def make(where: str, record: dict[str, Any], index: int) -> Iterator[Item]:
        caption = strings([get(record, "caption", str, where)], f"{where}, 'caption'")
        image, problem, _, region = _region(source, record, where)
        meta = {"image_id": record.get("image_id"), "box": thousandths(region)}
        yield Item(str(index), {"image": given(image), "box": region}, caption, [Text(caption[0])], meta=meta,
                   problem=problem, place=where)  # fmt: skip

    return each(entries(data.get("annotations"), f"{path}, 'annotations'"), make)


def read_region_questions(source: Source) -> Iterator[Item]:
    """JSON lines of {image, bbox, question, answer}."""

    def make(where: str, record: dict[str, Any], index: int) -> Iterator[Item]:
        answer = strings([get(record, "answer", str, where)], f"{where}, 'answer'")
        image, problem, _, region = _region(source, record, where)
        asks = get(record, "question", str, where)
        fields = {"image": given(image), "box": region, "question": asks}
        meta = {"question": asks, "box": thousandths(region)}
        yield Item(str(index), fields, answer[0], [Text(answer[0])], meta=meta, problem=problem, place=where)

    return each(line_entries(source.file(f"vgvqa_{source.phase}.jsonl")), make)


def _grounded(sent: str, size: tuple[int, int], where: str) -> Text:
    """A caption whose boxes are in pixels of an image of that size."""
    parts: list[str | Box] = []
    end = 0
    for found in _TAGGED.finditer(sent):
        pixels = box([float(side) for side in found.groups()], where)
        parts += [sent[end : found.start()], "<box>", Box.from_pixels(pixels, size), "</box>"]
        end = found.end()
    return Text.of(*parts, sent[end:])


def read_grounded_captions(source: Source) -> Iterator[Item]:
    """JSON lines of {image, sent}, where phrases have boxes in pixels: `<ref>a dog</ref><box>(1,2)(3,4)</box>`."""

    def make(where: str, record: dict[str, Any], index: int) -> Iterator[Item]:
        sent = strings([get(record, "sent", str, where)], f"{where}, 'sent'")[0]
        image, problem, size = _image(source, record, where)
        text = Text(sent) if problem else _grounded(sent, size, where)
        yield Item(str(index), {"image": given(image)}, [text.text], [text], problem=problem, place=where)

    return each(line_entries(source.file(f"{source.phase}.jsonl")), make)


_OBTAIN = "Write the annotations of RefCOCO as JSON lines {image, bbox: [x1, y1, x2, y2], sent}"
_REFCOCO: dict[str, Any] = {"makes": "text", "prompt": GROUNDING, "metrics": ("grounding_accuracy",), "crop": "squash",
                            "images": "coco/train2014", "annotations": "refcoco", "obtain": _OBTAIN}  # fmt: skip
_REGIONS: dict[str, Any] = {"makes": "text", "metrics": ("captions",), "crop": "squash"}


def _expressions(name: str, phases: tuple[str, ...]) -> TaskType:
    return TaskType(name, f"boxes of what expressions of {name} mean",
                    partial(read_expressions, name=f"{name}_{{phase}}.jsonl"), phases=phases, **_REFCOCO)  # fmt: skip


TASKS = (
    _expressions("refcoco", ("val", "testA", "testB", "train")),
    _expressions("refcoco+", ("val", "testA", "testB", "train")),
    _expressions("refcocog", ("val", "test", "train")),
    TaskType("grit_grounding", "boxes of noun phrases in web images",
             partial(read_expressions, name="train_grounding.jsonl"), makes="text", prompt=GROUNDING,
             metrics=("grounding_accuracy",), crop="squash", phases=("train",), options={"confidence": ()},
             images="grit/images", annotations="grit", obtain="Make JSON lines {image, sent, bbox, confidence}"),
    TaskType("region_caption", "descriptions of regions (Visual Genome, RefCOCOg)", read_regions, prompt=REFERRING,
             phases=("test", "val", "train"), images="vg/images", annotations="vg",
             obtain="Make a file {annotations: [{image_id, image, caption, bbox}]}",
             **_REGIONS),
    TaskType("region_vqa", "questions about regions (Visual Genome)", read_region_questions, makes="text",
             prompt=REGION_VQA, metrics=("gqa_accuracy",), crop="squash", phases=("train", "val", "test"),
             images="vg/images", annotations="vg", obtain="Make JSON lines {image, bbox, question, answer}"),
    TaskType("grounded_caption", "captions with boxes (GRIT, Flickr30k Entities)", read_grounded_captions,
             prompt=GROUNDED_CAPTION, phases=("train", "val", "test"), images="grit/images", annotations="grit",
             obtain="Make JSON lines {image, sent} with <ref>phrase</ref><box>(x1,y1)(x2,y2)</box> in pixels",
             **_REGIONS),
)  # fmt: skip
