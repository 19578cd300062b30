"""The most similar few-shot examples for each sample by CLIP (RICES), for the setting `neighbours` of a task.

Yang et al. 2022 (arXiv 2109.05014) choose examples by the similarity of images; docs/data_formats.md, "Few-shot
examples".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import PIL.Image
import torch

from ..document import Box, Image, Text
from ..io import InputError
from ..metrics.clip import CLIP
from ..metrics.image_files import rgb
from .base import Item, Task

CHUNK = 256  # samples whose similarities are computed together


def find_neighbours(
    task: Task, clip: CLIP, count: int, advance: Callable[[str], None] = lambda words: None
) -> dict[str, list[str]]:
    """For each sample of a task the ids of the most similar examples, the most similar first.

    Examples are those of the task's `shot_phase`. Those with the sample's own image are left out. A sample whose image
    cannot be read is not evaluated; it has the first examples.

    Args:
        task: the task.
        clip: embeds the images.
        count: number of examples of each sample.
        advance: called after each image with words about what was embedded.

    Raises:
        InputError: the task has no few-shot examples, or fewer than `count` can be used, or a sample has no image.
        MissingRequirement: the folder of CLIP has no model.
    """
    if not (task.config.shot_template or task.kind.example):
        raise InputError("the task has no few-shot examples", f"task '{task.name}'", "Give a 'shot_template'")
    samples = [item for item in task.items() if item.fields]
    known = _by_image(task.examples(), task)
    features, paths = _embed(known, clip, lambda: advance("examples"))
    sample_features, sample_paths = _embed(_by_image(samples, task), clip, lambda: advance("samples"))
    enough = [key for path in paths for key in known[path]]
    if len(enough) < count:
        raise InputError(f"{count} examples are wanted for each sample, but only {len(enough)} can be used",
                         f"task '{task.name}', phase '{task.config.shot_phase}'", "Use fewer")  # fmt: skip
    nearest: dict[Path, list[str]] = {}
    for start in range(0, len(sample_paths), CHUNK):
        similarity = sample_features[start : start + CHUNK] @ features.T  # [samples, images of examples]
        best = similarity.topk(min(count + 1, len(paths))).indices.tolist()
        for path, found in zip(sample_paths[start : start + CHUNK], best, strict=True):
            others = [key for index in found if paths[index] != path for key in known[paths[index]]]
            nearest[path] = others[:count]
    few = next((item for item in samples if len(nearest.get(_image(item, task), enough)) < count), None)
    if few is not None:
        raise InputError(f"fewer than {count} examples have another image", f"sample {few.id}", "Use fewer")
    return {item.id: nearest.get(_image(item, task), enough[:count]) for item in samples}


def _image(item: Item, task: Task) -> Path:
    """The first image of an item."""
    for value in item.fields.values():
        for segment in () if isinstance(value, str | Box) else [value] if isinstance(value, Text | Image) else value:
            if isinstance(segment, Image) and isinstance(segment.source, Path):
                return segment.source
    raise InputError("there is no image in a file to compare", item.place or task.name, "Choose another task")


def _by_image(items: Iterable[Item], task: Task) -> dict[Path, list[str]]:
    """The ids of the items of each image."""
    found: dict[Path, list[str]] = {}
    for item in items:
        found.setdefault(_image(item, task), []).append(item.id)
    return found


def _embed(images: Iterable[Path], clip: CLIP, advance: Callable[[], None]) -> tuple[torch.Tensor, list[Path]]:
    """Unit vectors [N, D] of the images that can be read, and their paths."""
    features: list[torch.Tensor] = []
    paths: list[Path] = []
    batch: list[PIL.Image.Image] = []
    for path in images:
        advance()
        try:
            batch.append(rgb(path))
        except InputError:
            continue
        paths.append(path)
        if len(batch) == clip.batch:
            features.append(clip.embed_images(batch))
            batch = []
    features += [clip.embed_images(batch)] if batch else []
    return torch.cat(features) if features else torch.zeros(0, 1), paths
