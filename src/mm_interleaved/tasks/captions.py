"""Captioning: COCO (Karpathy's split), Flickr30k, NoCaps, TextCaps, and paragraphs of Visual Genome.

Files, prompts and settings: docs/data_formats.md, "Captions".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..document import Text
from ..generation.settings import TEXT_PRESETS, GenerationSettings
from ..io import InputError
from .base import Item, TaskType, choose_answer, each, given, grouped
from .files import Source, checked, entries, get, read_json, strings, trailing_number

PROMPT = "{image} a photo of"
PARAGRAPH_PROMPT = "{image}Please describe the image in detail. The image depicts"
EXAMPLE = "Caption: {caption}"
METRICS = ("captions",)
SETTINGS = GenerationSettings(text=TEXT_PRESETS["caption"])


def first_sentence(text: str) -> str:
    """The text before the first full stop."""
    return text.strip().split(".")[0]


def read_karpathy(source: Source) -> Iterator[Item]:
    """A list of {image, caption: [five]}, as BLIP published it; the id is the number in the image's name."""
    path = source.file(f"annotations/coco_karpathy_{source.phase}.json")

    def make(where: str, record: dict[str, Any], index: int) -> Iterator[Item]:
        name = get(record, "image", str, where)
        value = record.get("caption")
        single = isinstance(value, str)  # the list for training has a record for every caption
        captions = strings([value] if single else value, f"{where}, 'caption'")
        number = str(trailing_number(name, where))
        image, problem = source.images.find(name)
        item = Item(f"{number}-{index}" if single else number, {"image": given(image)}, captions,
                    meta={"image_id": number}, problem=problem, place=where)  # fmt: skip
        yield _learned(item, [caption.lower() for caption in captions])

    return each(entries(read_json(path), str(path)), make)


def _learned(item: Item, captions: Sequence[str]) -> Item:
    """The item with its captions as answers: the first, and in training any that is not blank."""
    answers = [[Text(caption)] for caption in captions if caption.strip()]
    return choose_answer(replace(item, answer=answers[0]), answers)


def read_coco_form(names: Mapping[str, str]) -> Callable[[Source], Iterator[Item]]:
    """A reader of COCO's format: {images: [{id, file_name}], annotations: [{image_id, caption}]}.

    Args:
        names: name of the file by phase; that of a blind phase has only images.
    """

    def read(source: Source) -> Iterator[Item]:
        path = source.file(names[source.phase])
        data = checked(read_json(path), dict, str(path))
        captions, odd = ({}, []) if source.blind else grouped(
            entries(data.get("annotations"), f"{path}, 'annotations'"), "image_id", int
        )  # fmt: skip
        known: set[int] = set()

        def make(where: str, record: dict[str, Any], index: int) -> Iterator[Item]:
            number = get(record, "id", int, where)
            known.add(number)
            image, problem = source.images.find(get(record, "file_name", str, where))
            found = captions.get(number, ())
            texts = None if source.blind else _texts(found, f"{where}, captions of image {number}")
            meta = {"image_id": str(number)}
            if "domain" in record:
                meta["domain"] = get(record, "domain", str, where)
            item = Item(str(number), {"image": given(image)}, texts, meta=meta, problem=problem, place=where)
            yield item if texts is None else _learned(item, [text.lower() for text in texts])

        yield from each(entries(data.get("images"), f"{path}, 'images'"), make)
        yield from odd
        for number in [number for number in captions if number not in known]:
            yield Item.unusable(captions[number][0][0], f"there is no image {number} in 'images' of {path}")

    return read


def _texts(records: Sequence[tuple[str, dict[str, Any]]], where: str) -> list[str]:
    """The captions of records, at least one of which must not be blank."""
    return strings([get(record, "caption", str, place) for place, record in records], where)


def read_paragraphs(source: Source) -> Iterator[Item]:
    """`paragraphs_coco.json` and the ids of a phase; the image is the end of its URL (`VG_100K/2356347.jpg`).

    All paragraphs of an image are references, as in COCO's evaluation.
    """
    path = source.file("annotations/paragraphs_coco.json")
    split = source.file(f"annotations/{source.phase}_split.json")
    data = checked(read_json(path), dict, str(path))
    found, odd = grouped(entries(data.get("annotations"), f"{path}, 'annotations'"), "image_id", int)

    def make(where: str, number: int, index: int) -> Iterator[Item]:
        paragraphs = found.get(number)
        if not paragraphs:
            raise InputError(f"image {number} has no paragraph in {path}", where, "Take both files from one release")
        place, record = paragraphs[0]
        image, problem = source.images.find("/".join(get(record, "url", str, place).split("/")[-2:]))
        texts = _texts(paragraphs, place)
        item = Item(str(number), {"image": given(image)}, texts, meta={"image_id": str(number)}, problem=problem,
                    place=place)  # fmt: skip
        yield _learned(item, texts)

    yield from each(entries(read_json(split), str(split), int), make)
    yield from odd


def read_textcaps(source: Source) -> Iterator[Item]:
    """TextCaps 0.1: {data: [{image_id, caption_str, ...}]}, a record for each of the five captions of an image.

    Records also have `caption_id`, `reference_strs` (all five captions) and `image_path`; images are those of TextVQA,
    named by `image_id`. The test has one record for each image, without captions. (textvqa.org/textcaps)
    """
    path = source.file(f"TextCaps_0.1_{source.phase}.json")
    data = checked(read_json(path), dict, str(path))
    found, odd = grouped(entries(data.get("data"), f"{path}, 'data'"), "image_id", str)

    def make(where: str, number: str, index: int) -> Iterator[Item]:
        image, problem = source.images.find(f"{number}.jpg")
        item = Item(number, {"image": given(image)}, meta={"image_id": number}, problem=problem, place=where)
        if not source.blind:
            texts = strings([get(record, "caption_str", str, place) for place, record in found[number]], where)
            item = _learned(replace(item, reference=texts), texts)
        yield item

    yield from each(((found[number][0][0], partial(str, number)) for number in found), make)
    yield from odd


def _named_entry(number: str, meta: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {"image_id": number, "caption": text}


def _caption_entry(number: str, meta: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {"image_id": int(number), "caption": text}


_SHARED: dict[str, Any] = {"makes": "text", "prompt": PROMPT, "metrics": METRICS, "settings": SETTINGS,
                           "example": EXAMPLE}  # fmt: skip
TASKS = (
    TaskType("coco_karpathy", "captions of COCO images, Karpathy's split", read_karpathy, post=first_sentence,
             phases=("test", "val", "train"), images="coco", annotations="coco",
             obtain="Get coco_karpathy_*.json from the BLIP release, train2014 and val2014 from cocodataset.org",
             **_SHARED),
    TaskType("flickr30k", "captions of Flickr30k images, Karpathy's split",
             read_coco_form({"test": "test1k.token.coco_format", "val": "val.token.coco_format",
                             "train": "train.token.coco_format"}),
             phases=("test", "val", "train"), images="flickr30k/flickr30k-images", annotations="flickr30k",
             obtain="Ask the Flickr30k site for the images; write Karpathy's splits in COCO's form", **_SHARED),
    TaskType("nocaps", "captions of objects that COCO does not have",
             read_coco_form({"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}),
             phases=("val", "test"),
             blind={"test": ""}, submission=_caption_entry, images="nocaps/images", annotations="nocaps",
             obtain="Get the annotations from nocaps.org and the images that they list from Open Images", **_SHARED),
    TaskType("textcaps", "captions of images with text", read_textcaps, phases=("val", "train", "test"),
             blind={"test": "textvqa/test_images"}, submission=_named_entry, images="textvqa/train_images",
             annotations="textcaps", obtain="Get TextCaps 0.1 and the images of TextVQA from textvqa.org", **_SHARED),
    TaskType("image2paragraph", "paragraphs about Visual Genome images", read_paragraphs,
             makes="text", prompt=PARAGRAPH_PROMPT, metrics=METRICS,
             settings=GenerationSettings(text=TEXT_PRESETS["paragraph"]), example=EXAMPLE,
             phases=("test", "val", "train"), images="image2paragraph/images", annotations="image2paragraph",
             obtain="Get the paragraphs and Visual Genome's two archives of images; convert them to COCO's form"),
)  # fmt: skip
