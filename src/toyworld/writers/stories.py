"""Stories of five images, as VIST, PororoSV and FlintstonesSV.

    annotations/val_formatted_filtered.json, images/val_images/10000010.png
    descriptions.npy, img_cache4.npy, following_cache4.npy, train_seen_unseen_ids.npy, Toy_1/1000001_0.png
    following_cache4.pkl, train-val-test_split.json, flintstones_annotations_v1-0.json, video_frames_sampled_png/...

The clips of the last two are vertical strips of frames of 128 x 128 pixels, whatever size is asked for.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..draw import draw
from ..scene import Scene
from ..stories import Story
from .base import Format, Job, write_json

LENGTH = 5
FRAME = 128
PLACES = 10  # images are numbered by ten times the story's number and their place in it
CAST = {"pororo": ("Pororo", "Loopy", "Eddy"), "flintstones": ("Fred", "Barney", "Wilma")}
SPLITS = ("train", "val", "test")

Clip = tuple[str, str]  # name, text


def story_of(job: Job, index: int) -> tuple[Story, np.random.Generator]:
    """The story of sample number `index`, and what to make further choices with."""
    rng = job.rng(index)
    return job.world.story(rng, LENGTH, job.split), rng


def write(job: Job, indices: range, folder: Path, *, images: str, cast: str = "") -> list[list[Clip]]:
    """Images; returns the clips of each story."""
    found = []
    for index in indices:
        story, rng = story_of(job, index)
        names = dict(zip(story.characters, CAST.get(cast, story.characters), strict=False))
        clips = []
        for place, frame in enumerate(story.frames):
            name = images.format(split=job.split, number=PLACES * job.number(index) + place)
            path = folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            (strip(frame.scene, 1 + int(rng.random() * 3)) if cast else job.world.draw(frame.scene, job.size)).save(
                path
            )
            clips.append((name, re.sub("|".join(names), lambda found, n=names: n[found[0]], frame.text)))
        found.append(clips)
    return found


def strip(scene: Scene, frames: int) -> PIL.Image.Image:
    """A clip: the same scene, with other grass and clouds in each frame."""
    found = [np.asarray(draw(replace(scene, seed=scene.seed + i), FRAME)) for i in range(frames)]
    return PIL.Image.fromarray(np.concatenate(found))


def finish_vist(job: Job, results: list[list[list[Clip]]], folder: Path) -> None:
    """Stories by id; as in the original, the turns of a story may stand in any order."""
    stories = {}
    for index, clips in enumerate(s for batch in results for s in batch):
        turns: list[dict[str, Any]] = [
            {"sequence_index": place, "image_id": Path(name).name, "caption": text}
            for place, (name, text) in enumerate(clips)
        ]
        stories[str(job.number(index))] = turns[::-1] if index % 2 else turns
    write_json({"annotations": stories}, folder / "annotations" / f"{job.split}_formatted_filtered.json")


def finish_pororo(job: Job, results: list[list[list[Clip]]], folder: Path) -> None:
    """Four arrays, of which three are pickled as in the original."""
    stories = [clips for batch in results for clips in batch]
    described = {name: [text] for clips in stories for name, text in clips}
    order = np.random.default_rng([job.seed, SPLITS.index(job.split)]).permutation(len(stories))
    ids = np.empty(len(SPLITS), object)
    ids[:] = [order if split == job.split else np.zeros(0, np.int64) for split in SPLITS]
    np.save(folder / "descriptions.npy", np.array(described, object), allow_pickle=True)
    np.save(folder / "img_cache4.npy", np.array([f"{clips[0][0]}.png".encode() for clips in stories]))
    np.save(folder / "following_cache4.npy", np.array([[f"{n}.png".encode() for n, _ in c[1:]] for c in stories]))
    np.save(folder / "train_seen_unseen_ids.npy", ids, allow_pickle=True)


def finish_flintstones(job: Job, results: list[list[list[Clip]]], folder: Path) -> None:
    """A pickle of what follows each clip, the splits, and the descriptions."""
    stories = [[(Path(name).name, text) for name, text in clips] for batch in results for clips in batch]
    following = {clips[i][0]: [n for n, _ in clips[i + 1 : i + LENGTH]] for clips in stories for i in range(LENGTH)}
    (folder / "following_cache4.pkl").write_bytes(pickle.dumps(following))
    split = {part: [name for clips in stories for name, _ in clips] if part == job.split else [] for part in SPLITS}
    write_json(split, folder / "train-val-test_split.json")
    described = [{"globalID": name, "description": text} for clips in stories for name, text in clips]
    write_json(described, folder / "flintstones_annotations_v1-0.json")


FORMATS = (
    Format("vist", "stories of five images, as VIST", partial(write, images="images/{split}_images/{number}"),
           finish_vist, 100),
    Format("pororo", "stories of five clips, as PororoSV", partial(write, images="Toy_1/{number}", cast="pororo"),
           finish_pororo, 100),
    Format("flintstones", "stories of five clips, as FlintstonesSV",
           partial(write, images="video_frames_sampled_png/s_01_e01_shot_{number}", cast="flintstones"),
           finish_flintstones, 100),
)  # fmt: skip
