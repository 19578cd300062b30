"""Illustrated stories: VIST, PororoSV and FlintstonesSV (docs/data_formats.md, "Stories").

Protocols: only the last image is generated, or all images after the first, each with the images generated before it as
context. The context may be limited to its texts or its images, or be empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..document import Image, Segment, Text
from ..io import InputError
from ..io.images import load_image
from .base import Item, TaskType, each, given, grouped, only, usable
from .files import Source, checked, entries, get, read_json, records, strings
from .pickles import read_npy, read_pickle

CONTEXTS = ("multi_modal", "image_only", "text_only", "current")
FRAME = 128  # pixels of a frame's side in a strip
PORORO_SPLITS = {"train": 0, "val": 1, "test": 2}
PORORO = ("Pororo", "Loopy", "Eddy", "Harry", "Poby", "Tongtong", "Crong", "Rody", "Petty")
FLINTSTONES_FILES = ("following_cache4.pkl", "train-val-test_split.json", "flintstones_annotations_v1-0.json")
FLINTSTONES = ("Fred", "Barney", "Wilma", "Betty", "Pebbles", "Dino", "Slate")


@dataclass(frozen=True)
class Turn:
    """A caption, its image (or why there is none), the name of the image, and its frame in a clip."""

    caption: str
    image: Any
    problem: str = ""
    frame: int | None = None
    name: str = ""


def lay_out(turns: Sequence[Turn], context: str, count: int) -> list[Segment]:
    """Captions and images alternately; the last `count` images are open slots.

    Args:
        turns: the story.
        context: one of `CONTEXTS`: what is kept of the turns before the first slot.
        count: number of images to generate, at the end.
    """
    segments: list[Segment] = []
    for index, turn in enumerate(turns):
        last = index >= len(turns) - count
        if context != "image_only" and (last or context != "current"):
            segments.append(Text(turn.caption, supervise=False))
        if last:
            segments.append(Image())
        elif context in ("multi_modal", "image_only"):
            segments.append(given(turn.image))
    return segments


def _item(source: Source, number: str, turns: list[Turn], count: int, where: str) -> Item:
    segments = lay_out(turns, source.options["context"], count)
    targets = [turn.image for turn in turns[len(turns) - count :]]
    meta: dict[str, Any] = {
        "captions": [t.caption for t in turns],
        "generated": [t.name for t in turns[len(turns) - count :]],
    }
    if turns[0].frame is not None:
        meta["frames"] = [t.frame for t in turns]
    problem = next((t.problem for t in turns if t.problem), "")
    reference = [p if isinstance(p, PIL.Image.Image) else str(p) for p in targets]
    return Item(number, {"story": segments}, reference, [Image(p) for p in targets], meta=meta, problem=problem,
                place=where)  # fmt: skip


# ---- VIST


def _vist(source: Source, make: Callable[[str, str, list[Turn]], Iterator[Item]]) -> Iterator[Item]:
    """The items of `make(name, place, turns)` for every story."""
    path = source.file(f"annotations/{source.phase}_formatted_filtered.json")
    stories = get(checked(read_json(path), dict, str(path)), "annotations", dict, str(path))
    names = sorted(stories)

    def read(where: str, story: Any, index: int) -> Iterator[Item]:
        found = [(get(r, "sequence_index", int, w), w, r) for w, r in records(story, where)]
        turns = []
        for _, place, record in sorted(found, key=lambda item: item[0]):
            caption = strings([get(record, "caption", str, place)], f"{place}, 'caption'")[0].strip()
            image = f"{source.phase}_images/{get(record, 'image_id', str, place)}.png"
            turns.append(Turn(caption, *source.images.find(image), name=Path(image).stem))
        return make(names[index], where, turns)

    return each(((f"{path}, story {name}", partial(stories.get, name)) for name in names), read)


def _prefixes(source: Source, turns: list[Turn]) -> list[int]:
    """The numbers of turns of the samples of a story. With `compat` the whole story is missing, as in the original."""
    if source.options["rounds"] == "last":
        return [len(turns)]
    if source.compat:
        return list(range(1, len(turns)))
    return list(range(1 if source.options["context"] == "current" else 2, len(turns) + 1))


def read_vist(source: Source) -> Iterator[Item]:
    """Stories whose last image is generated; with `rounds=all` also their shorter beginnings."""

    def make(name: str, where: str, turns: list[Turn]) -> Iterator[Item]:
        for length in _prefixes(source, turns):
            number = name if source.options["rounds"] == "last" else f"{name}-{length}"
            count = length - 1 if source.options["protocol"] == "autoregressive" and length > 1 else 1
            yield _item(source, number, turns[:length], count, where)

    return _vist(source, make)


def read_vist_text(source: Source) -> Iterator[Item]:
    """Stories whose last text is generated."""
    context = source.options["context"]

    def make(name: str, where: str, turns: list[Turn]) -> Iterator[Item]:
        for length in _prefixes(source, turns):
            *before, last = turns[:length]
            segments = [] if context == "current" else lay_out(before, context, 0)
            if context != "text_only":
                segments.append(Image(last.image, supervise=False))
            problem = next((t.problem for t in turns[:length] if t.problem), "")
            number = name if source.options["rounds"] == "last" else f"{name}-{length}"
            meta = {"captions": [t.caption for t in turns[:length]]}
            yield Item(number, {"story": segments}, [last.caption], [Text(last.caption)], meta=meta, problem=problem,
                       place=where)  # fmt: skip

    return _vist(source, make)


# ---- clips: one frame of each is chosen by the seed for evaluation, and anew for each training document


def tidy(caption: str, characters: Sequence[str]) -> str:
    """Lower case except for the characters' names, without line breaks and tabs."""
    text = caption.lower()
    for name in characters:
        text = text.replace(name.lower(), name)
    return re.sub(r"[\n\t\r]", "", text).strip()


def _frame(path: Path, rng: np.random.Generator) -> tuple[PIL.Image.Image, int]:
    """A random frame of a vertical strip, and its number.

    Raises:
        InputError: the file cannot be read, or is no strip.
    """
    strip = load_image(path)
    if strip.width != FRAME or strip.height < FRAME:
        raise InputError(f"'{path}' is no strip of frames of {FRAME} x {FRAME} pixels", fix="Convert the clip")
    frame = int(rng.integers(strip.height // FRAME))
    return strip.crop((0, frame * FRAME, FRAME, (frame + 1) * FRAME)), frame


def _clips(source: Source, number: str, index: int, clips: list[tuple[str, str]], where: str) -> Item:
    """The item of a story, from its clips (image, caption). For training, its frames are chosen when it is varied."""
    found = [source.images.find(name) for name, _ in clips]
    problem = next((problem for _, problem in found if problem), "")
    count = len(clips) - 1 if source.options["protocol"] == "autoregressive" else 1

    def with_frames(rng: np.random.Generator, problem: str = "") -> Item:
        turns = []
        for (name, caption), (path, _) in zip(clips, found, strict=True):
            image, frame = (path, 0) if problem else _frame(path, rng)
            turns.append(Turn(caption, image, "", frame, Path(name).stem))
        item = _item(source, number, turns, count, where)
        return replace(item, meta={**item.meta, "clips": [path for path, _ in found]}, problem=problem)

    if source.training and not problem:
        return Item(number, {"story": ()}, place=where, vary=with_frames)
    rng = np.random.default_rng([source.seed, index])
    try:
        return with_frames(rng, problem)
    except InputError as error:
        return with_frames(rng, str(error))


def _name(value: Any, where: str) -> str:
    """A file name; some files have them as printed bytes, `b'...'`."""
    text = value.decode("latin1") if isinstance(value, bytes) else checked(value, str, where)
    wrapped = re.fullmatch(r"""b(['"])(.*)\1""", text)
    return wrapped[2] if wrapped else text


def read_pororo(source: Source) -> Iterator[Item]:
    """`descriptions.npy`, `img_cache4.npy`, `following_cache4.npy` and `train_seen_unseen_ids.npy`."""
    paths = {name: source.file(f"{name}.npy") for name in
             ("descriptions", "img_cache4", "following_cache4", "train_seen_unseen_ids")}  # fmt: skip
    files = {name: str(path) for name, path in paths.items()}
    captions = checked(read_npy(paths["descriptions"]), dict, files["descriptions"])
    first = checked(read_npy(paths["img_cache4"]), list, files["img_cache4"])
    following = checked(read_npy(paths["following_cache4"]), list, files["following_cache4"])
    splits = checked(read_npy(paths["train_seen_unseen_ids"]), list, files["train_seen_unseen_ids"])
    if len(splits) != len(PORORO_SPLITS) or len(first) != len(following):
        problem = f"{len(splits)} splits, {len(first)} first and {len(following)} following clips"
        raise InputError(f"{problem}; there should be 3, and as many of one as of the other",
                         files["train_seen_unseen_ids"], "Take all files from one release")  # fmt: skip
    chosen = checked(splits[PORORO_SPLITS[source.phase]], list, files["train_seen_unseen_ids"])
    numbers, odd = usable(entries(chosen, files["train_seen_unseen_ids"], int), lambda where, number: number)

    def make(where: str, number: int, index: int) -> Iterator[Item]:
        if not 0 <= number < len(first):
            raise InputError(f"there is no story {number}, only {len(first)}", files["train_seen_unseen_ids"],
                            "Take all files from one release")  # fmt: skip
        names = [_name(v, where) for v in [first[number], *checked(following[number], list, where)]]
        clips = [(name, tidy(_pororo_caption(captions, name, where), PORORO)) for name in names]
        yield _clips(source, str(number), index, clips, where)

    places = [f"{files['img_cache4']}, story {number}" for number in sorted(numbers)]
    yield from each(zip(places, [partial(int, number) for number in sorted(numbers)], strict=True), make)
    yield from odd


def _pororo_caption(captions: dict[str, Any], name: str, where: str) -> str:
    key = name.removesuffix(".png")
    value = captions.get(key)
    if value is None:
        raise InputError(f"clip '{key}' has no description", where, "Take all files from one release")
    return strings(value if isinstance(value, list) else [value], f"{where}, description of '{key}'")[0]


def read_flintstones(source: Source) -> Iterator[Item]:
    """`following_cache4.pkl`, `train-val-test_split.json` and `flintstones_annotations_v1-0.json`."""
    cache, split, descriptions = (source.file(name) for name in FLINTSTONES_FILES)
    following = checked(read_pickle(cache), dict, str(cache))
    captions, odd = grouped(entries(read_json(descriptions), str(descriptions)), "globalID", str)
    names = get(checked(read_json(split), dict, str(split)), source.phase, list, str(split))
    numbers, unnamed = usable(entries(names, str(split), str), lambda where, number: number)
    chosen = [number for number in sorted(numbers) if len(following.get(number, ())) == 4]

    def make(where: str, number: str, index: int) -> Iterator[Item]:
        clips = []
        for name in [number, *(_name(v, where) for v in following[number])]:
            place, record = only(captions, name, where, f"clip '{name}' has no description in {descriptions}")
            text = strings([get(record, "description", str, place)], f"{descriptions}, clip '{name}'")[0]
            clips.append((f"video_frames_sampled_png/{name}.png", tidy(text, FLINTSTONES)))
        yield _clips(source, number, index, clips, where)

    yield from each(((f"{cache}, story {number}", partial(str, number)) for number in chosen), make)
    yield from (*odd, *unnamed)


_SHARED: dict[str, Any] = {"makes": "image", "prompt": "{story}", "metrics": ("fid", "image_similarity")}
_CLIPS: dict[str, Any] = {
    "options": {"context": CONTEXTS, "protocol": ("autoregressive", "last")}, "phases": ("test", "val", "train"),
    **_SHARED,
}  # fmt: skip
_VIST = {"images": "vist/images", "annotations": "vist", "phases": ("val", "test", "train"),
         "obtain": "Get VIST's stories and images; group them as {annotations: {story: [{sequence_index, image_id, "
                   "caption}]}} without stories that lack images"}  # fmt: skip
TASKS = (
    TaskType("vist", "the last image of photo stories", read_vist,
             options={"context": CONTEXTS, "rounds": ("last", "all"), "protocol": ("last", "autoregressive")},
             **_SHARED, **_VIST),
    TaskType("vist_text", "the last sentence of photo stories", read_vist_text, makes="text", prompt="{story}",
             metrics=("captions",), options={"context": CONTEXTS, "rounds": ("last", "all")}, **_VIST),
    TaskType("pororo", "cartoon stories of Pororo, continued", read_pororo, images="pororo", annotations="pororo",
             obtain="Get PororoSV as StoryGAN or StoryDALL-E publish it", **_CLIPS),
    TaskType("flintstones", "cartoon stories of the Flintstones, continued", read_flintstones, images="flintstones",
             annotations="flintstones", obtain="Get FlintstonesSV as StoryDALL-E publishes it; write each video as a "
             "vertical PNG strip of 128 x 128 frames", **_CLIPS),
)  # fmt: skip
