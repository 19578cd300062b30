"""Regions in the files of Visual Genome, GRIT and Flickr30k Entities (docs/data_formats.md, "Boxes and regions").

A training document has an image and several of its regions, drawn anew in each epoch: descriptions of boxes
(`ask: referring`), boxes of descriptions (`grounding`), or a caption with boxes (`caption`).
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ..document import Box, Image, Segment, Text
from ..io import FileSlice, InputError, parse_json, read_text
from .base import Item, TaskType, choose_answer, each, given, grouped, only
from .files import Entry, Source, checked, entries, get, read_json, records, strings
from .grounding import GROUNDED_CAPTION, GROUNDING, REFERRING, thousandths, threshold

PROMPT = "{image}{regions}"
IMAGES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Region:
    """A description and the box of what it describes."""

    text: str
    box: Box


def _asked(regions: Sequence[Region], ask: str) -> tuple[list[Segment], list[Segment]]:
    """Questions about regions, each followed by a slot, and the answers of the slots."""
    asked: list[Segment] = []
    answers: list[Segment] = []
    for region in regions:
        if ask == "grounding":
            question = GROUNDING.removeprefix("{image}").format(caption=region.text)
            asked += [Text(question, supervise=False), Text()]
            answers.append(Text.of(region.box, "</box>", attached=True))
        else:
            before, after = REFERRING.removeprefix("{image}").split("{box}")
            asked += [Text.of(before, region.box, after, supervise=False), Text()]
            answers.append(Text(region.text))
    return asked, answers


def _with_regions(item: Item, image: Image, regions: Sequence[Region], ask: str, count: int) -> Item:
    """The item with questions about its first regions; in training about some of them, in any order."""

    def about(chosen: Sequence[Region]) -> Item:
        asked, answers = _asked(chosen, ask)
        meta = {"regions": [(region.text, thousandths(region.box)) for region in chosen]}
        return replace(item, fields={"image": image, "regions": asked}, answer=answers, meta=meta,
                       reference=[region.text for region in chosen])  # fmt: skip

    def vary(rng: np.random.Generator) -> Item:
        return about([regions[i] for i in rng.permutation(len(regions))[:count].tolist()])

    return replace(about(regions[:count]), vary=vary)


def _count(source: Source) -> int:
    """The number of regions of a document, from the option `regions`.

    Raises:
        InputError: it is no number above 0.
    """
    text = source.options.get("regions") or "5"
    if not text.isascii() or not text.isdigit() or not int(text):
        raise InputError(f"option 'regions' must be a number of at least 1, not '{text}'", f"task '{source.task}'")
    return int(text)


# ---- Visual Genome


def read_visual_genome(source: Source) -> Iterator[Item]:
    """Visual Genome's `region_descriptions.json` with `image_data.json`.

    The first is [{image_id (or id), regions: [{region_id, x, y, width, height, phrase, ...}]}], boxes in pixels; the
    second [{image_id, url, width, height, coco_id, flickr_id}]. The image is the end of its URL, `VG_100K/1.jpg`. Boxes
    are cut at the image's border; a region without area is named and left out.
    """
    path, data = source.file("region_descriptions.json"), source.file("image_data.json")
    known, odd = grouped(entries(read_json(data), str(data)), "image_id", int)
    ask, count = source.options["ask"], _count(source)

    def make(where: str, record: dict[str, Any], index: int) -> Iterator[Item]:
        number = get(record, "image_id" if "image_id" in record else "id", int, where)
        place, about = only(known, number, where, f"image {number} is not in {data}")
        size = get(about, "width", int, place), get(about, "height", int, place)
        image, problem = source.images.find("/".join(get(about, "url", str, place).split("/")[-2:]))
        regions = []
        for spot, region in records(record.get("regions"), f"{where}, 'regions'"):
            try:
                regions.append(_visual_genome_region(region, size, spot))
            except InputError as error:
                yield Item.unusable(spot, str(error))
        if regions:
            item = Item(str(number), {}, problem=problem, place=where)
            yield _with_regions(item, given(image), regions, ask, count)

    yield from each(entries(read_json(path), str(path)), make)
    yield from odd


def _visual_genome_region(region: Mapping[str, Any], size: tuple[int, int], where: str) -> Region:
    x, y, width, height = (get(region, key, float, where) for key in ("x", "y", "width", "height"))
    phrase = strings([get(region, "phrase", str, where)], f"{where}, 'phrase'")[0].strip()
    sides = [min(max(v, 0.0), float(size[i % 2])) for i, v in enumerate((x, y, x + width, y + height))]
    if not (sides[0] < sides[2] and sides[1] < sides[3]):
        raise InputError("the region has no area in the image", where, "Leave it out, or correct it")
    return Region(phrase, Box.from_pixels(sides, size))


# ---- GRIT


def read_grit(source: Source) -> Iterator[Item]:
    """GRIT (zzliang/GRIT) as img2dataset writes it: tar shards with an image and a `.json` for each caption.

    The JSON has `caption`, `key`, `width`, `height` and, if img2dataset was asked to keep these columns, `id`,
    `noun_chunks` and `ref_exps`: lists of [start, end, x1, y1, x2, y2, confidence], the characters of the caption that
    have the box, in shares of the image's sides. `noun_chunks` make captions, `ref_exps` questions.
    """
    shards = sorted(source.annotations.glob(source.options.get("shards") or "*.tar"))
    if not shards:
        pattern = source.options.get("shards") or "*.tar"
        raise InputError(f"task '{source.task}' needs tar shards, and none matches '{pattern}'",
                         str(source.annotations), source.obtain)  # fmt: skip
    ask, count, least = source.options["ask"], _count(source), threshold(source)

    def make(where: str, files: dict[str, FileSlice], index: int) -> Iterator[Item]:
        image = next((files[extension] for extension in IMAGES if extension in files), None)
        if image is None or "json" not in files:
            raise InputError(f"an image and a .json belong together; there is {', '.join(files)}", where,
                             "Download the shard again")  # fmt: skip
        record = checked(parse_json(files["json"].read(), where, strict=False), dict, where)
        caption = strings([get(record, "caption", str, where)], f"{where}, 'caption'")[0]
        spans = _spans(record, "noun_chunks" if ask == "caption" else "ref_exps", len(caption), least, where)
        if not spans:
            return
        item = Item(where.rpartition("/")[2], {"image": given(image)}, place=where)
        if ask == "caption":
            tagged = _tagged(caption, spans)
            asked = [Text(GROUNDED_CAPTION.removeprefix("{image}"), supervise=False), Text()]
            yield replace(item, fields={"image": given(image), "regions": asked}, answer=[tagged],
                          reference=[tagged.text])  # fmt: skip
        else:
            regions = [Region(caption[start:end], box) for start, end, box in spans]
            yield _with_regions(item, given(image), regions, ask, count)

    for shard in shards:
        yield from each(_tar_samples(shard), make)


def _tar_samples(path: Path) -> Iterator[Entry]:
    """The files of each sample of a tar shard, by extension; files with one stem are a sample."""
    try:
        with tarfile.open(path, "r:") as archive:
            found: dict[str, dict[str, FileSlice]] = {}
            for member in archive:
                if member.isreg():
                    folder, slash, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    piece = FileSlice(path, member.offset_data, member.size)
                    found.setdefault(f"{folder}{slash}{stem}", {})[extension.lower()] = piece
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"not a tar archive that can be read: {error}", str(path), "Download it again") from None
    return ((f"{path}, sample {stem}", partial(dict, files)) for stem, files in found.items())


def _spans(record: Mapping[str, Any], key: str, length: int, least: float, where: str) -> list[tuple[int, int, Box]]:
    """(start, end, box) of a caption's phrases with enough confidence, in their order; nested ones are left out."""
    spans = []
    for i, value in enumerate(get(record, key, list, where)):
        place = f"{where}, '{key}'[{i}]"
        numbers = [checked(v, float, place) for v in checked(value, list, place)]
        if len(numbers) != 7 or not 0 <= numbers[0] < numbers[1] <= length:
            raise InputError(f"{value} is not [start, end, x1, y1, x2, y2, confidence] of a caption of {length} "
                             "characters", place, "Download it again")  # fmt: skip
        start, end, *sides, confidence = numbers
        if confidence >= least:
            spans.append((int(start), int(end), Box.from_pixels(sides, (1, 1))))
    return sorted(spans, key=lambda span: (span[0], -span[1]))


def _tagged(caption: str, spans: Sequence[tuple[int, int, Box]]) -> Text:
    """The caption with the boxes of its phrases. Several boxes of a phrase follow each other."""
    parts: list[str | Box] = []
    last, phrase = 0, (-1, -1)
    for start, end, box in spans:
        if (start, end) != phrase:
            if start < last:  # within the phrase before it, or overlapping it
                continue
            parts += [caption[last:start], "<ref>", caption[start:end], "</ref>"]
            last, phrase = end, (start, end)
        parts += ["<box>", box, "</box>"]
    return Text.of(*parts, caption[last:])


# ---- Flickr30k Entities

_PHRASE = re.compile(r"\[/EN#(\d+)(?:/[^\s\]]+)+ ([^\]]*)\]")


@dataclass(frozen=True)
class Entities:
    """An image of Flickr30k Entities: its number, path, problem, size, captions, and boxes by coreference chain."""

    number: str
    image: Path
    problem: str
    captions: list[str]
    boxes: Mapping[str, Sequence[Box]]
    where: str


def _read_entities(source: Source) -> Iterator[Entry]:
    """The images of a phase, each with its place.

    `{phase}.txt` lists images, one a line. `Sentences/{image}.txt` has five captions, in which a phrase is
    `[/EN#chain/type/... words]`; chain 0 is not visible. `Annotations/{image}.xml` has <size> with <width> and
    <height>, and an <object> for each box, with a <name> for each of its chains and <bndbox> (<xmin>, <ymin>, <xmax>,
    <ymax>, in pixels that are counted from 1), or <scene> and <nobndbox>. (BryanPlummer/flickr30k_entities)
    """
    path = source.file(f"{source.phase}.txt")
    names = read_text(path).split()
    if not names:
        raise InputError("the list is empty", str(path), source.obtain)
    for name in names:
        yield f"{path}, image {name}", partial(_entities, source, name, f"{path}, image {name}")


def _entities(source: Source, name: str, where: str) -> Entities:
    if not name.isdigit():
        raise InputError(f"'{name}' is no number of an image", where, source.obtain)
    captions = read_text(source.file(f"Sentences/{name}.txt")).splitlines()
    image, problem = source.images.find(f"{name}.jpg")
    boxes = _chains(source.file(f"Annotations/{name}.xml"))
    return Entities(name, image, problem, [c.strip() for c in captions if c.strip()], boxes, where)


def _chains(path: Path) -> dict[str, list[Box]]:
    """Boxes by coreference chain."""
    text = read_text(path)
    try:
        if "<!DOCTYPE" in text:
            raise InputError("the file declares a document type, which these files do not", str(path))
        root = ElementTree.fromstring(text)
        size = int(root.findtext("size/width", "")), int(root.findtext("size/height", ""))
        found: dict[str, list[Box]] = {}
        for thing in root.iter("object"):
            if (corners := thing.find("bndbox")) is None:
                continue
            sides = [float(corners.findtext(key, "")) - 1 for key in ("xmin", "ymin", "xmax", "ymax")]
            for name in thing.findall("name"):
                found.setdefault((name.text or "").strip(), []).append(Box.from_pixels(sides, size))
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"not an annotation that can be read: {error}", str(path), "Fetch it again") from None
    return found


def read_entity_captions(source: Source) -> Iterator[Item]:
    """Captions with the boxes of their phrases; one of the five is learned, another one in each epoch."""

    def make(where: str, found: Entities, index: int) -> Iterator[Item]:
        captions = [_boxed(caption, found) for caption in found.captions]
        texts = strings([caption.text for caption in captions], f"{where}, captions")
        item = Item(found.number, {"image": given(found.image)}, texts, [captions[0]],
                    meta={"image_id": found.number}, problem=found.problem, place=where)  # fmt: skip
        yield choose_answer(item, [[caption] for caption in captions])

    return each(_read_entities(source), make)


def _boxed(caption: str, found: Entities) -> Text:
    parts: list[str | Box] = []
    end = 0
    for phrase in _PHRASE.finditer(caption):
        parts.append(caption[end : phrase.start()])
        boxes = found.boxes.get(phrase[1], ())
        parts.append(f"<ref>{phrase[2]}</ref>" if boxes else phrase[2])
        for box in boxes:
            parts += ["<box>", box, "</box>"]
        end = phrase.end()
    return Text.of(*parts, caption[end:])


def read_entity_phrases(source: Source) -> Iterator[Item]:
    """The box of each phrase; of several boxes the one around them all (the "merged boxes" protocol)."""

    def make(where: str, found: Entities, index: int) -> Iterator[Item]:
        for line, caption in enumerate(found.captions):
            for place, phrase in enumerate(_PHRASE.finditer(caption)):
                if boxes := found.boxes.get(phrase[1], ()):
                    around = _around(boxes)
                    yield Item(f"{found.number}-{line}-{place}",
                               {"image": given(found.image), "caption": phrase[2]}, thousandths(around),
                               [Text.of(around, "</box>", attached=True)], meta={"caption": phrase[2]},
                               problem=found.problem, place=where)  # fmt: skip

    return each(_read_entities(source), make)


def _around(boxes: Sequence[Box]) -> Box:
    sides = list(zip(*(box.sides for box in boxes), strict=True))
    return Box(min(sides[0]), min(sides[1]), max(sides[2]), max(sides[3]))


_REGIONS: dict[str, Any] = {"makes": "text", "prompt": PROMPT, "metrics": (), "crop": "squash", "phases": ("train",)}
_ENTITIES: dict[str, Any] = {
    "makes": "text", "crop": "squash", "phases": ("test", "val", "train"), "images": "flickr30k/flickr30k-images",
    "annotations": "flickr30k_entities",
    "obtain": "Get annotations.zip and the three lists from github.com/BryanPlummer/flickr30k_entities, and Flickr30k",
}  # fmt: skip
TASKS = (
    TaskType("vg_regions", "regions of Visual Genome images, for training", read_visual_genome,
             options={"ask": ("referring", "grounding"), "regions": ()}, images="vg/images", annotations="vg",
             obtain="Get region_descriptions.json, image_data.json and both archives of images from visualgenome.org",
             **_REGIONS),
    TaskType("grit", "captions and phrases with boxes in web images, for training", read_grit,
             options={"ask": ("caption", "grounding", "referring"), "regions": (), "confidence": (), "shards": ()},
             images="grit", annotations="grit",
             obtain="Download zzliang/GRIT with img2dataset as webdataset, with its columns noun_chunks and ref_exps",
             **_REGIONS),
    TaskType("flickr30k_entities", "captions of Flickr30k images with boxes", read_entity_captions,
             prompt=GROUNDED_CAPTION, metrics=("captions",), **_ENTITIES),
    TaskType("flickr30k_phrases", "boxes of phrases in Flickr30k images", read_entity_phrases, prompt=GROUNDING,
             metrics=("grounding_accuracy",), **_ENTITIES),
)  # fmt: skip
