"""Batches of fixed sizes: whole documents packed into rows, with their images as layers instead of pixels.

A worker process makes a document in half a millisecond, since nothing is drawn there. Every batch has the same number
of rows, images, target images and labels, so one captured step takes them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from mm_interleaved.document import Image
from mm_interleaved.model.layout import Layout, find_images, plan, previous_images
from mm_interleaved.model.mmfs import VisibleImages
from mm_interleaved.processor import MMInterleavedProcessor
from mm_interleaved.processor.batch import build_labels
from mm_interleaved.processor.packing import TokenStream

from ..documents import DocumentMix, Painter, random_document
from ..language import Caption
from ..sampling import Split, scene_rng
from ..scene import Scene
from ..train_detector import labels as scene_labels
from .layers import Atlas, LayeredImages
from .ranks import Ranks
from .stated import OBJECTS, STATED, stated_facts

LOOKAHEAD = 24  # documents among which one is sought that fits into what is left of a row


@dataclass(frozen=True)
class Sizes:
    """What a batch holds.

    Attributes:
        rows: of tokens.
        length: tokens of a row.
        images: room for so many.
        targets: images that the image loss is about, those without weight included.
        samples: noise samples of each of them.
        conditioning: earlier images that targets may see, in all.
        context: tokens of the longest context of a target.
        labels: tokens to learn.
        visible: images that a token may see.
    """

    rows: int = 64
    length: int = 512
    images: int = 640
    targets: int = 256
    samples: int = 2
    conditioning: int = 160
    context: int = 320
    labels: int = 16384
    visible: int = 6

    def shared(self, ranks: Ranks) -> Sizes:
        """The sizes of the part of a batch that each process has."""
        divided = ("rows", "images", "targets", "conditioning", "labels")
        return replace(self, **{name: ranks.share(getattr(self, name), f"sizes.{name}") for name in divided})


@dataclass
class RowBatch:
    """A batch on its way to the model.

    Attributes:
        input_ids, attention_mask: [B, L].
        layout: of the batch.
        image_loss_mask: float32 [I].
        geometry, traits: [I, 9, 4] and [I, 9, 6], what the images show; see `train_detector.SceneBatches`.
        stated, ground: [T, OBJECTS, len(STATED)] and [T], what the text before each target states; -100: nothing.
        pictures: what is to be composed.
        documents, tokens, images, lost_labels: how many there are, and labels that there was no room for.
    """

    input_ids: Tensor
    attention_mask: Tensor
    layout: Layout
    image_loss_mask: Tensor
    geometry: Tensor
    traits: Tensor
    stated: Tensor
    ground: Tensor
    pictures: LayeredImages
    documents: int
    tokens: int
    images: int
    lost_labels: int

    def to(self, device: torch.device) -> RowBatch:
        """The same batch on a device."""
        return rebuilt(self, (x.to(device, non_blocking=True) for x in tensors_of(self)))

    def pin_memory(self) -> RowBatch:
        """The same batch in page-locked memory, from which copies to a GPU are fast."""
        return rebuilt(self, (x.pin_memory() for x in tensors_of(self)))


class RecordingPainter(Painter):
    """Keeps scenes instead of drawing them; the source of an image is its number."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.seen: list[tuple[Scene, Caption | None, bool]] = []

    def scene(self, scene: Scene, caption: Caption | None = None) -> str:
        """The number of the scene."""
        self.seen.append((scene, caption, False))
        return str(len(self.seen) - 1)

    def labels(self, scene: Scene) -> str:
        """The number of the label map."""
        self.seen.append((scene, None, True))
        return str(len(self.seen) - 1)


@dataclass
class _Ready:
    """A document as tokens, and its images."""

    stream: TokenStream
    images: list[tuple[Scene, Caption | None, bool]]


class ToyRows(IterableDataset[RowBatch]):
    """Batches without end; the n-th document of a worker follows from the seed alone.

    Args:
        sizes: of a batch.
        processor: of the model.
        atlas: what images are composed of.
        seed: of the documents; every part of a run has its own.
        mix: weights of the forms, see `DocumentMix.of`.
        objects: the fewest and the most objects of a scene.
        split: that the scenes are from.
    """

    def __init__(
        self, sizes: Sizes, processor: MMInterleavedProcessor, atlas: Atlas, seed: int, mix: Mapping[str, float],
        objects: tuple[int, int] = (1, 5), split: Split = "train",
    ) -> None:  # fmt: skip
        self.sizes, self.processor, self.atlas, self.seed = sizes, processor, atlas, seed
        self.mix, self.objects = DocumentMix.of(mix), objects
        self.split: Split = split

    def __iter__(self) -> Iterator[RowBatch]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None:
            torch.set_num_threads(1)
        documents = self._documents(first, step)
        waiting: list[_Ready] = []
        while True:
            yield self._batch(documents, waiting)

    def _documents(self, index: int, step: int) -> Iterator[_Ready]:
        longest = min(self.sizes.length, self.sizes.context)
        while True:
            rng, painter = scene_rng(self.seed, self.split, index), RecordingPainter(self.atlas.size)
            document = random_document(rng, split=self.split, size=painter, mix=self.mix, objects=self.objects)
            index += step
            stream = self.processor.encode(document.segments, close=True)
            starts = np.flatnonzero(stream.ids == self.processor.soi_token_id)
            fits = len(stream) <= self.sizes.length and len(starts) <= self.sizes.visible
            if fits and (len(starts) == 0 or starts[-1] < longest):
                images = [painter.seen[int(cast(str, image.source))] for image in stream.images]
                yield _Ready(stream, images)

    def _batch(self, documents: Iterator[_Ready], waiting: list[_Ready]) -> RowBatch:
        """Rows are filled one after the other; no document that has too many images for what is left of the batch."""
        rows, images = [], self.sizes.images
        for _ in range(self.sizes.rows):
            row: list[_Ready] = []
            left = self.sizes.length
            while True:
                while len(waiting) < LOOKAHEAD:
                    waiting.append(next(documents))
                fitting = (i for i, d in enumerate(waiting) if len(d.stream) <= left and len(d.images) <= images)
                chosen = next(fitting, None)
                if chosen is None:
                    break
                row.append(waiting.pop(chosen))
                left -= len(row[-1].stream)
                images -= len(row[-1].images)
            rows.append(row)
        return self._assembled(rows)

    def _assembled(self, rows: list[list[_Ready]]) -> RowBatch:
        sizes, tokens = self.sizes, self.processor.tokenizer
        ids = np.full((sizes.rows, sizes.length), tokens.pad_token_id, np.int64)
        learned, real = np.zeros(ids.shape, bool), np.zeros(ids.shape, np.int64)
        shown: list[tuple[Scene, Caption | None, bool]] = []
        images: list[Image] = []
        starts: list[int] = []
        for number, row in enumerate(rows):
            at = 0
            for document in row:
                stream = document.stream
                place = np.s_[number, at : at + len(stream)]
                ids[place], learned[place], real[place] = stream.ids, stream.learned, 1
                starts += [at] * len(stream.images)
                shown += document.images
                images += stream.images
                at += len(stream)
        input_ids, mask = torch.from_numpy(ids), torch.from_numpy(real)
        own = {"bos_token_id": tokens.bos_token_id, "soi_token_id": self.processor.soi_token_id}
        wanted = build_labels(input_ids, mask, image_token_id=self.processor.image_token_id,
                              learned=torch.from_numpy(learned), **own)  # fmt: skip
        document_starts = torch.tensor(starts)
        targets, weights = self._targets(input_ids, mask, document_starts, images)
        layout = plan(input_ids, mask, document_starts, labels=wanted, previous=1, target_images=targets,
                      repeats=sizes.samples, routes=False, **own)  # fmt: skip
        if not len(layout.conditioning_images):  # no target image sees another; the sizes stay those of other batches
            nobody = VisibleImages(torch.full((len(layout.earlier.images), 1), -1), None)
            layout = replace(layout, conditioning_images=torch.zeros(1, dtype=torch.long), earlier=nobody)
        layout = layout.filled(sizes.images, sizes.visible, sizes.conditioning, sizes.context, sizes.labels)
        assert layout.label_positions is not None
        assert layout.label_ids is not None
        lost = len(layout.label_ids) - sizes.labels
        layout.label_positions, layout.label_ids = (
            layout.label_positions[: sizes.labels],
            layout.label_ids[: sizes.labels],
        )
        geometry, traits = _labelled(shown, sizes.images)
        said, ground = _told([shown[i][1] for i in targets.tolist()])
        drawn = [self.atlas.label_map(s) if map_ else self.atlas.image(s) for s, _, map_ in shown]
        return RowBatch(
            input_ids, mask, layout, weights, geometry, traits, said, ground, LayeredImages.join(drawn, sizes.images),
            sum(map(len, rows)), int(real.sum()), len(shown), max(lost, 0),
        )  # fmt: skip

    def _targets(self, input_ids: Tensor, mask: Tensor, starts: Tensor, images: list[Image]) -> tuple[Tensor, Tensor]:
        """Numbers of the target images, and weights of all images: as many to learn as there is room for.

        Raises:
            ValueError: there are fewer images than `Sizes.targets`.
        """
        sizes = self.sizes
        positions = find_images(input_ids, mask, self.processor.soi_token_id, starts)
        earlier = previous_images(positions, 1)
        sees = (earlier >= 0).any(1).numpy() if earlier.shape[1] else np.zeros(len(images), bool)
        wanted = np.array([image.supervise for image in images])
        order = np.random.default_rng((self.seed, len(images), int(input_ids.sum()))).permutation(len(images))
        chosen = self._within([i for i in order if wanted[i]], sees, sizes.targets, sizes.conditioning)
        weights = np.zeros(sizes.images, np.float32)
        weights[chosen] = 1.0
        rest = [i for i in order if not wanted[i] and not sees[i]]
        chosen = chosen + rest[: sizes.targets - len(chosen)]
        if len(chosen) < sizes.targets:
            raise ValueError(
                f"a batch has {len(images)} images, too few for {sizes.targets} targets; lower Sizes.targets"
            )
        return torch.tensor(sorted(chosen)), torch.from_numpy(weights)

    @staticmethod
    def _within(order: list[int], sees: np.ndarray, targets: int, conditioning: int) -> list[int]:
        chosen: list[int] = []
        for i in order:
            if len(chosen) < targets and (not sees[i] or conditioning > 0):
                chosen.append(int(i))
                conditioning -= bool(sees[i])
        return chosen


def _labelled(shown: list[tuple[Scene, Caption | None, bool]], count: int) -> tuple[Tensor, Tensor]:
    """What the images show; label maps show nothing that is asked for, but where things are."""
    geometry, traits = [], []
    for scene, _, is_map in shown:
        places, values = scene_labels(scene)
        if is_map:
            values = torch.full_like(values, -1)
        geometry.append(places)
        traits.append(values)
    fill = count - len(shown)
    geometry, traits = torch.stack(geometry), torch.stack(traits)
    return (
        torch.cat([geometry, geometry.new_zeros(fill, *geometry.shape[1:])]),
        torch.cat([traits, traits.new_full((fill, *traits.shape[1:]), -1)]),
    )


def _told(captions: list[Caption | None]) -> tuple[Tensor, Tensor]:
    found = torch.full((len(captions), OBJECTS, len(STATED)), -100)
    ground = torch.full((len(captions),), -100)
    for i, text in enumerate(captions):
        if text is not None:
            found[i], ground[i] = stated_facts(text)
    return found, ground


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in (nested) dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for one in fields(value):
            yield from tensors_of(getattr(value, one.name))


def rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """`value` with other tensors."""
    if isinstance(value, Tensor):
        return next(tensors)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: rebuilt(getattr(value, one.name), tensors) for one in fields(value)})
    return value
