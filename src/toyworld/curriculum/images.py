"""Batches for the curriculum: images and captions of scenes of the toy world, or the images of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from mm_interleaved.data import leave_process_group
from mm_interleaved.io.images import load_image
from mm_interleaved.processor.images import CROPS
from mm_interleaved.training.pipeline import BatchStats, Prepare

from ..detector import PIXELS
from ..draw import draw
from ..language import Caption, caption, paragraph
from ..language.words import chance
from ..sampling import Split, random_scene, scene_rng
from ..scene import Scene
from ..train_detector import labels
from .config import ImagesConfig
from .stated import stated_facts

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Item = dict[str, Tensor]


class ToyImages(Dataset[Item]):
    """Scenes of the toy world, drawn when asked for: `images`, uint8 [3, side, side]."""

    def __init__(self, config: ImagesConfig, side: int) -> None:
        self.config, self.side = config, side
        self.split: Split = cast(Split, config.split)

    def __len__(self) -> int:
        return self.config.count

    def __getitem__(self, index: int) -> Item:
        rng = scene_rng(self.config.seed, self.split, index)
        return {"images": _tensor(np.array(draw(random_scene(rng, split=self.split), self.side)))}


class ToyScenes(Dataset[Item]):
    """The same as a model sees them, with what they show: `geometry` and `traits`, see `train_detector.SceneBatches`.

    Args:
        config: which scenes.
        side: at which they are seen; they are drawn at the labels' 128 pixels.
    """

    def __init__(self, config: ImagesConfig, side: int) -> None:
        self.config, self.side = config, side
        self.split: Split = cast(Split, config.split)

    def __len__(self) -> int:
        return self.config.count

    def __getitem__(self, index: int) -> Item:
        rng = scene_rng(self.config.seed, self.split, index)
        scene = random_scene(rng, split=self.split)
        geometry, traits = labels(scene)
        image = CROPS["center"](draw(scene, PIXELS), self.side)
        return {"images": _tensor(image), "geometry": geometry, "traits": traits}


class ToyTexts(Dataset[Item]):
    """Texts and what they state.

    An item has `input_ids` [length] with `<s>` and a begin-of-image token around a caption or a paragraph, padded on
    the right; `lengths`, the number of its tokens; `stated` and `ground`, what the text states (see `stated`).

    Args:
        config: which scenes.
        tokenizer: the tokenizer of the texts.
        soi: the id of the begin-of-image token.
        length: most tokens of a text; a longer one is written again.
    """

    def __init__(self, config: ImagesConfig, tokenizer: PreTrainedTokenizerBase, soi: int, length: int = 128) -> None:
        self.config, self.tokenizer, self.soi, self.length = config, tokenizer, soi, length
        self.split: Split = cast(Split, config.split)

    def __len__(self) -> int:
        return self.config.count

    def __getitem__(self, index: int) -> Item:
        rng = scene_rng(self.config.seed, self.split, index)
        scene = random_scene(rng, split=self.split)
        text, ids = self._written(scene, rng)
        while len(ids) > self.length:
            text, ids = self._written(scene, rng)
        stated, ground = stated_facts(text)
        padded = torch.full((self.length,), cast(int, self.tokenizer.pad_token_id))
        padded[: len(ids)] = torch.tensor(ids)
        return {"input_ids": padded, "lengths": torch.tensor(len(ids)), "stated": stated, "ground": ground}

    def _written(self, scene: Scene, rng: np.random.Generator) -> tuple[Caption, list[int]]:
        text = paragraph(scene, rng) if chance(rng, 0.5) else caption(scene, rng, bare=chance(rng, 0.3))
        words = self.tokenizer(text.text, add_special_tokens=False).input_ids
        return text, [cast(int, self.tokenizer.bos_token_id), *words, self.soi]


class FolderImages(Dataset[Item]):
    """Every image below a folder, cut square and resized: `images`, uint8 [3, side, side]."""

    def __init__(self, folder: Path, side: int) -> None:
        self.side = side
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
        if not self.files:
            raise ValueError(f"'{folder}' holds no image ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        return {"images": _tensor(CROPS["center"](load_image(self.files[index]), self.side))}


ImageSet = ToyImages | ToyScenes | ToyTexts | FolderImages


def _tensor(image: np.ndarray) -> Tensor:
    return torch.tensor(image).permute(2, 0, 1).contiguous()


def images_of(config: ImagesConfig, side: int) -> ToyImages | FolderImages:
    """The images that `config` names."""
    return ToyImages(config, side) if config.folder is None else FolderImages(Path(config.folder), side)


class ImageLoader:
    """Batches of images, in an order that follows from seed and epoch; see `pipeline.Loader`."""

    def __init__(self, config: ImagesConfig, dataset: ImageSet, rank: int = 0, world_size: int = 1) -> None:
        self.config, self.dataset, self.rank, self.world_size = config, dataset, rank, world_size
        self.epoch, self.served = 0, 0
        if len(self.dataset) < config.batch_size * world_size:
            raise ValueError(
                f"{len(self.dataset)} images are fewer than a batch of {config.batch_size} on each of {world_size} "
                "processes"
            )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = np.random.default_rng((self.config.seed, self.epoch)).permutation(len(self.dataset))
        order = order[: len(order) // self.world_size * self.world_size][self.rank :: self.world_size]
        size, workers = self.config.batch_size, self.config.num_workers
        loader = DataLoader(
            self.dataset,
            batch_size=size,
            sampler=order[self.served * size :].tolist(),
            drop_last=True,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=leave_process_group if workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.config.seed),  # leaves the global one alone
        )
        for batch in loader:
            self.served += 1
            yield batch
        self.epoch, self.served = self.epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Start that epoch from its beginning."""
        if epoch != self.epoch:
            self.epoch, self.served = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"epoch": self.epoch, "served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.epoch, self.served = state["epoch"], state["served"]


def prepare_scenes(batch: dict[str, Tensor], seed: int, device: torch.device) -> dict[str, Any]:
    """The `Prepare` for batches of labelled scenes."""
    tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    return {**tensors, "stats": BatchStats(0, len(batch["images"]), 0)}


def prepare_texts(batch: dict[str, Tensor], seed: int, device: torch.device) -> dict[str, Any]:
    """The `Prepare` for batches of texts about scenes: cut to their longest, in steps of 16 tokens."""
    longest = -(-int(batch["lengths"].max()) // 16) * 16
    batch = {**batch, "input_ids": batch["input_ids"][:, :longest]}
    tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    return {**tensors, "stats": BatchStats(int(batch["lengths"].sum()), 0, 0)}


def prepare_images(latents: tuple[int, int, int]) -> Prepare:
    """The `Prepare` for batches of images, with noise of the latents' shape."""

    def prepare(batch: dict[str, Tensor], seed: int, device: torch.device) -> dict[str, Any]:
        pixels = batch["images"].to(device, non_blocking=True).float() / 127.5 - 1
        if device.type == "cuda":
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        generator = torch.Generator(device).manual_seed(seed)
        noise = torch.randn(len(pixels), *latents, generator=generator, device=device)
        return {"pixels": pixels, "noise": noise, "stats": BatchStats(0, len(pixels), len(pixels))}

    return prepare
