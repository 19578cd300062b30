"""The stream of batches into the model: endless, on the device, with layouts and noise samples."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..model import MMInterleavedModel
from ..model.layout import Layout
from ..ops import HAS_TRITON
from ..processor import Batch
from .config import LossConfig, ShapesConfig
from .counting import LossCounts, image_weights, weighed

_PLANNED = {"image_rows", "labels"}  # not needed with a layout: used for checks, or part of it
_PER_IMAGE = {"pixel_values", "target_pixel_values", "document_starts", "image_loss_mask"}
KEPT_BATCHES = 16  # newest batches that are kept for a dump, in case a loss is not finite
_STRIDE = 0x9E3779B97F4A7C15  # spreads neighbouring numbers over all seeds


class Loader(Protocol):
    """The interface of `data.DocumentLoader`."""

    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch, from the loaded state on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch."""
        ...

    def load_states(self, states: Sequence[dict[str, Any]]) -> int:
        """Continue from the positions of all processes of a run, of which there may have been another number.

        Returns: the epoch in which this process goes on.
        """
        ...

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch, which determines its order."""
        ...

    def take_seconds(self) -> dict[str, float]:
        """The seconds that a loading process spent on each kind of `data.loader.WORK` since the last call."""
        ...


Prepare = Callable[[Any, int, torch.device], dict[str, Any]]


@dataclass
class BatchStats:
    """Counts of a pipeline since the last `BatchPipeline.take_stats`.

    Attributes:
        tokens: real tokens.
        images: images for the visual tokenizer.
        noise_samples: noise samples of target images.
        places: tokens with padding.
        wait: seconds spent waiting for the loader.
        work: seconds that a loading process spent on each kind of work.
    """

    tokens: int = 0
    images: int = 0
    noise_samples: int = 0
    places: int = 0
    wait: float = 0.0
    work: dict[str, float] = field(default_factory=dict)


def seed_of(*numbers: int) -> int:
    """A seed that is computed from several numbers; practically always different for different numbers."""
    mixed = 0
    for number in numbers:
        mixed = ((mixed ^ number) * _STRIDE + number + 1) % 2**64
        mixed ^= mixed >> 29
    return mixed % 2**63


class BatchPipeline:
    """An endless iterator over batches, as arguments of the model.

    The random numbers of a batch follow from the seed and from its number over all ranks. So they do not depend on
    interruptions, nor on whether batches are distributed over ranks or over accumulation steps.

    Args:
        loader: yields one epoch of batches at a time.
        prepare: turns a batch, its seed and the device into arguments of the model.
        seed: seed of all random numbers.
        device: device of the tensors.
        rank, world_size: rank of this process and number of processes.
    """

    def __init__(
        self, loader: Loader, prepare: Prepare, seed: int, device: torch.device, rank: int = 0, world_size: int = 1
    ) -> None:
        self.loader, self.prepare, self.seed, self.device = loader, prepare, seed, device
        self.rank, self.world_size = rank, world_size
        self.epoch, self.number = 0, 0
        self.stats = BatchStats()
        self.recent: deque[tuple[int, Any]] = deque(maxlen=KEPT_BATCHES)
        self._resumed = False  # whether the loader is inside an epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            if not self._resumed:
                self.loader.set_epoch(self.epoch)
            self._resumed = False
            batches = iter(self.loader)
            while (batch := self._next(batches)) is not None:
                yield self._serve(batch)
            self.epoch += 1

    def _next(self, batches: Iterator[Any]) -> Any:
        begin = time.perf_counter()
        batch = next(batches, None)
        self.stats.wait += time.perf_counter() - begin
        return batch

    def _serve(self, batch: Any) -> dict[str, Any]:
        seed = seed_of(self.seed, self.number * self.world_size + self.rank)
        self.recent.append((self.number, batch))
        self.number += 1
        arguments = self.prepare(batch, seed, self.device)
        stats = arguments.pop("stats")
        for name in ("tokens", "images", "noise_samples", "places"):
            setattr(self.stats, name, getattr(self.stats, name) + getattr(stats, name))
        return arguments

    def take_stats(self) -> BatchStats:
        """The counts so far; resets them."""
        stats, self.stats = self.stats, BatchStats()
        stats.work = self.loader.take_seconds()
        return stats

    def state_dict(self) -> dict[str, Any]:
        """The state that determines all further batches."""
        return {"number": self.number, "loader": self.loader.state_dict()}

    def load_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue where `state_dict` was called on every process of a run.

        Args:
            states: the states by rank; there may have been another number of processes. Batches are counted over all
                of them, so their random numbers stay the same if as many batches make a step.
        """
        self.number = -(-sum(state["number"] for state in states) // self.world_size)
        self.epoch = self.loader.load_states([state["loader"] for state in states])
        self._resumed = True


def prepare_documents(model: MMInterleavedModel, losses: LossConfig, shapes: ShapesConfig | None = None) -> Prepare:
    """The `Prepare` function for batches of documents: layouts and random choices on the CPU, noise on the device.

    Args:
        model: the model.
        losses: weights of the losses, and the share of images in the image loss.
        shapes: sizes that batches are padded to; None: no padding.
    """
    shapes, globally = shapes or ShapesConfig(), losses.scale == "global"

    def prepare(batch: Batch, seed: int, device: torch.device) -> dict[str, Any]:
        images = len(batch.pixel_values)
        learned = image_weights(batch, model.config) if globally else batch.get("image_loss_mask")
        targets = choose_targets(images, losses.image_fraction, seed, shapes, learned, learned_only=globally)
        layout = _planned(model, batch, targets, losses.noise_samples_per_image, shapes, device)
        count = losses.noise_samples_per_image * len(layout.target_images)
        counts = None
        if globally:
            assert learned is not None
            counts = LossCounts(layout.num_labels, float(learned[layout.target_images].sum()))
        generator = torch.Generator(device).manual_seed(seed)
        weights = {"loss_text_weight": losses.text, "loss_image_weight": losses.image}
        weights = {name: batch.get(name, weight) for name, weight in weights.items()}
        tensors = {n: x.to(device, non_blocking=True) for n, x in batch.items() if n not in _PLANNED | weights.keys()}
        if fill := _size(images, shapes.images, shapes) - images:
            for name in _PER_IMAGE & tensors.keys():
                own = tensors[name]
                tensors[name] = torch.cat([own, own.new_zeros(fill, *own.shape[1:])])
        if not layout.padded:
            tensors.pop("position_ids", None)  # the model's default, from 0 in each row or sample, is the same
        return {
            **tensors,
            **weights,
            "layout": layout.to(device, non_blocking=True),
            "noise_samples": model.image_decoder.sample_noise(count, generator) if count else None,
            **({} if counts is None else {"counts": weighed(counts, weights, model.config)}),
            "stats": BatchStats(int(batch.attention_mask.sum()), images, count, batch.attention_mask.numel()),
        }

    return prepare


def _planned(
    model: MMInterleavedModel,
    batch: Batch,
    target_images: torch.Tensor | None,
    repeats: int,
    shapes: ShapesConfig,
    device: torch.device,
) -> Layout:
    """The layout of a batch, padded to the sizes in `shapes`."""
    layout = model.plan(
        batch.input_ids,
        batch.attention_mask,
        batch.document_starts,
        batch.get("labels"),
        target_images,
        repeats,
        routes=device.type != "cuda" or not HAS_TRITON,
        sample_ids=batch.get("sample_ids"),
    )
    return layout.filled(
        _size(len(batch.pixel_values), shapes.images, shapes),
        shapes.visible,
        _size(len(layout.conditioning_images), shapes.conditioning, shapes),
        min(_size(layout.context_length, shapes.context, shapes), model.config.max_context_length),
        shapes.labelled,
    )


def _size(own: int, wanted: int, shapes: ShapesConfig) -> int:
    """The size that `own` is padded to."""
    return wanted if own <= wanted else -(-own // shapes.multiple) * shapes.multiple


def choose_targets(
    count: int,
    fraction: float,
    seed: int,
    shapes: ShapesConfig,
    weights: torch.Tensor | None = None,
    learned_only: bool = False,
) -> torch.Tensor | None:
    """Numbers of the target images among `count` images, in order; None: all.

    Images of weight 0 are chosen last; with `learned_only` they are chosen only to reach the size in `shapes`.
    """
    among = count if weights is None or not learned_only else int((weights != 0).sum())
    wanted = math.ceil(fraction * among)
    wanted = wanted // shapes.multiple * shapes.multiple or wanted
    if 0 < shapes.targets <= count:
        wanted = shapes.targets
    if wanted == count:
        return None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if weights is not None:
        order = order[(weights[order] == 0).to(torch.uint8).argsort(stable=True)]
    return order[:wanted].sort().values
