"""Batches on their way into the model: endless, on the right device, planned, with their random numbers."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..model import MMInterleavedModel
from ..ops import HAS_TRITON
from ..processor import Batch
from .config import LossConfig, ShapesConfig

_OF_PICTURES = {"pixel_values", "target_pixel_values", "image_rows", "document_starts", "image_loss_mask"}
KEPT_BATCHES = 16  # newest batches that are held for a dump, should their loss be no number
_STRIDE = 0x9E3779B97F4A7C15  # spreads neighbouring numbers over all seeds


class Loader(Protocol):
    """What `data.build_loader` gives."""

    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch, from where the state says."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, behind the last batch given."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """The order of the next epoch."""
        ...


Prepare = Callable[[Any, int, torch.device], dict[str, Any]]


@dataclass
class Served:
    """What went through a feed since the last `Feed.take_counts`.

    Attributes:
        tokens: real tokens.
        pictures: pictures seen.
        drawn: pictures drawn, each noise counted.
        wait: seconds spent waiting for the loader.
    """

    tokens: int = 0
    pictures: int = 0
    drawn: int = 0
    wait: float = 0.0


def seed_of(*numbers: int) -> int:
    """One seed for generators out of several numbers; different for different numbers, for all that matters here."""
    mixed = 0
    for number in numbers:
        mixed = ((mixed ^ number) * _STRIDE + number + 1) % 2**64
        mixed ^= mixed >> 29
    return mixed % 2**63


class Feed:
    """Batch after batch, epoch after epoch, as arguments of the model.

    The random numbers of a batch follow from the seed and from its number over all ranks, so they do not depend on
    where a run was interrupted, nor on whether batches are spread over ranks or over accumulation steps.

    Args:
        loader: gives one epoch of batches at a time.
        prepare: turns a batch, its seed and the device into arguments of the model.
        seed: of all random numbers.
        device: where the tensors go.
        rank, world_size: of this process.
    """

    def __init__(
        self, loader: Loader, prepare: Prepare, seed: int, device: torch.device, rank: int = 0, world_size: int = 1
    ) -> None:
        self.loader, self.prepare, self.seed, self.device = loader, prepare, seed, device
        self.rank, self.world_size = rank, world_size
        self.epoch, self.number = 0, 0
        self.counts = Served()
        self.recent: deque[tuple[int, Any]] = deque(maxlen=KEPT_BATCHES)
        self._resumed = False  # the loader stands in the middle of an epoch

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
        self.counts.wait += time.perf_counter() - begin
        return batch

    def _serve(self, batch: Any) -> dict[str, Any]:
        seed = seed_of(self.seed, self.number * self.world_size + self.rank)
        self.recent.append((self.number, batch))
        self.number += 1
        arguments = self.prepare(batch, seed, self.device)
        counts = arguments.pop("counts")
        for name in ("tokens", "pictures", "drawn"):
            setattr(self.counts, name, getattr(self.counts, name) + getattr(counts, name))
        return arguments

    def take_counts(self) -> Served:
        """The counts so far, which then start anew."""
        counts, self.counts = self.counts, Served()
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to give the same batches from here on."""
        return {"epoch": self.epoch, "number": self.number, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.epoch, self.number = state["epoch"], state["number"]
        self.loader.set_epoch(self.epoch)
        self.loader.load_state_dict(state["loader"])
        self._resumed = True


def prepare_documents(model: MMInterleavedModel, losses: LossConfig, shapes: ShapesConfig | None = None) -> Prepare:
    """The `Prepare` for batches of documents: index arithmetic and choices on the CPU, noise on the device.

    Args:
        model: that they are for.
        losses: their weights, and how many pictures are drawn.
        shapes: sizes that batches are brought to; None: as they are.
    """
    shapes = shapes or ShapesConfig()

    def prepare(batch: Batch, seed: int, device: torch.device) -> dict[str, Any]:
        pictures = len(batch.pixel_values)
        drawn = choose_pictures(pictures, losses.image_fraction, seed, shapes, batch.image_loss_mask)
        layout = model.plan(
            batch.input_ids,
            batch.attention_mask,
            batch.document_starts,
            batch.labels,
            drawn,
            losses.draws_per_image,
            routes=device.type != "cuda" or not HAS_TRITON,
        )
        seen = _size(pictures, shapes.pictures, shapes)
        longest = _size(layout.context_length, shapes.context, shapes)
        layout = layout.filled(
            seen,
            shapes.visible,
            _size(len(layout.conditioning), shapes.conditioning, shapes),
            min(longest, model.config.max_context_length),
            shapes.labelled,
        )
        count = losses.draws_per_image * (pictures if drawn is None else len(drawn))
        generator = torch.Generator(device).manual_seed(seed)
        weights = {"loss_text_weight": losses.text, "loss_image_weight": losses.image}
        for name in weights:
            if getattr(batch, name) is not None:
                weights[name] = getattr(batch, name)
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        if fill := seen - pictures:
            for name in _OF_PICTURES & tensors.keys():
                own = tensors[name]
                tensors[name] = torch.cat([own, own.new_zeros(fill, *own.shape[1:])])
        if not layout.padded:
            tensors.pop("position_ids", None)  # counted from 0 in each row, as without them
        return {
            **tensors,
            **weights,
            "layout": layout.to(device, non_blocking=True),
            "draws": model.image_decoder.draw(count, generator) if count else None,
            "counts": Served(int(batch.attention_mask.sum()), pictures, count),
        }

    return prepare


def _size(own: int, wanted: int, shapes: ShapesConfig) -> int:
    """What `own` is filled up to."""
    return wanted if own <= wanted else -(-own // shapes.multiple) * shapes.multiple


def choose_pictures(
    count: int, fraction: float, seed: int, shapes: ShapesConfig, weights: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Which of `count` pictures are drawn, in order; None: all. Those of weight 0 come last."""
    wanted = math.ceil(fraction * count)
    wanted = wanted // shapes.multiple * shapes.multiple or wanted
    if 0 < shapes.drawn <= count:
        wanted = shapes.drawn
    if wanted == count:
        return None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if weights is not None:
        order = order[(weights[order] == 0).to(torch.uint8).argsort(stable=True)]
    return order[:wanted].sort().values


def prepare_scenes(batch: dict[str, torch.Tensor], seed: int, device: torch.device) -> dict[str, Any]:
    """The `Prepare` for batches of labelled scenes."""
    tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    return {**tensors, "counts": Served(0, len(batch["pictures"]), 0)}


def prepare_texts(batch: dict[str, torch.Tensor], seed: int, device: torch.device) -> dict[str, Any]:
    """The `Prepare` for batches of texts about scenes: cut to their longest, in steps of 16 tokens."""
    longest = -(-int(batch["lengths"].max()) // 16) * 16
    batch = {**batch, "input_ids": batch["input_ids"][:, :longest]}
    tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    return {**tensors, "counts": Served(int(batch["lengths"].sum()), 0, 0)}


def prepare_pictures(latents: tuple[int, int, int]) -> Prepare:
    """The `Prepare` for batches of pictures, with noise of the latents' shape."""

    def prepare(batch: dict[str, torch.Tensor], seed: int, device: torch.device) -> dict[str, Any]:
        pixels = batch["pictures"].to(device, non_blocking=True).float() / 127.5 - 1
        if device.type == "cuda":
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        generator = torch.Generator(device).manual_seed(seed)
        noise = torch.randn(len(pixels), *latents, generator=generator, device=device)
        return {"pixels": pixels, "noise": noise, "counts": Served(0, len(pixels), len(pixels))}

    return prepare
