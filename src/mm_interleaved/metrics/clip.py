"""CLIP similarity of images to images and to texts, and selection of the best candidate image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .image_files import ImageLike, rgb
from .result import MetricResult, MissingRequirement, aligned, reports_missing

FIX = "fetch openai/clip-vit-large-patch14 (the release's) and give the path of its folder"


@dataclass(frozen=True)
class CLIP:
    """A CLIP model from a local folder; nothing is downloaded.

    Attributes:
        folder: model, tokenizer and image processor, as transformers saves them.
        device: the device it runs on.
        batch: number of images or texts in a batch.
    """

    folder: Path | None
    device: torch.device | str = "cpu"
    batch: int = 32

    @cached_property
    def _parts(self) -> tuple[CLIPModel, Any, Any]:
        if self.folder is None or not (self.folder / "config.json").is_file():
            where = "no folder was given" if self.folder is None else f"{self.folder} has no config.json"
            raise MissingRequirement(f"no CLIP model: {where}", FIX)
        model = CLIPModel.from_pretrained(self.folder, local_files_only=True, dtype=torch.float32)
        images = AutoImageProcessor.from_pretrained(self.folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        # transformers' decorator around Module.to hides its `self`
        return model.to(self.device).eval(), images, tokenizer  # pyright: ignore[reportArgumentType]

    @torch.inference_mode()
    def embed_images(self, images: Sequence[ImageLike]) -> torch.Tensor:
        """Unit vectors [N, D] of images."""
        model, image_processor, _ = self._parts
        found = []
        for start in range(0, len(images), self.batch):
            chosen = [rgb(image) for image in images[start : start + self.batch]]
            pixels = image_processor(chosen, return_tensors="pt")["pixel_values"].to(self.device)
            found.append(_pooled(model.get_image_features(pixel_values=pixels)))
        return torch.nn.functional.normalize(torch.cat(found), dim=-1).cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [N, D] of texts; tokens after the model's 77 are dropped."""
        model, _, tokenizer = self._parts
        text = model.config.text_config
        assert isinstance(text, CLIPTextConfig)
        length = text.max_position_embeddings
        found = []
        for start in range(0, len(texts), self.batch):
            batch = tokenizer(
                list(texts[start : start + self.batch]), padding="max_length", truncation=True, max_length=length,
                return_tensors="pt",
            ).to(self.device)  # fmt: skip
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            found.append(_pooled(model.get_text_features(**inputs)))
        return torch.nn.functional.normalize(torch.cat(found), dim=-1).cpu()

    def rerank(self, candidates: Sequence[ImageLike], text: str) -> tuple[int, list[float]]:
        """The index of the candidate with the highest cosine similarity to a text, and the cosine of each.

        Raises:
            MissingRequirement: no model in the folder.
            ValueError: no candidates.
        """
        if not candidates:
            raise ValueError("re-ranking needs at least one candidate image")
        cosines = (self.embed_images(candidates) @ self.embed_texts([text])[0]).tolist()
        return cosines.index(max(cosines)), cosines


@dataclass(frozen=True)
class ImageSimilarity:
    """Mean cosine of generated images (by id) and reference images: `clip_image_image`, for stories."""

    clip: CLIP

    @reports_missing
    def __call__(
        self, predictions: Mapping[Hashable, ImageLike], references: Mapping[Hashable, ImageLike]
    ) -> MetricResult:
        """Score images.

        Raises:
            ValueError: the ids differ.
        """
        rows = aligned(predictions, references)
        made = self.clip.embed_images([image for _, image, _ in rows])
        return _cosines("clip_image_image", rows, made, self.clip.embed_images([image for _, _, image in rows]))


@dataclass(frozen=True)
class TextSimilarity:
    """Mean cosine of generated images (by id) and their prompts: `clip_text_image`."""

    clip: CLIP

    @reports_missing
    def __call__(self, predictions: Mapping[Hashable, ImageLike], references: Mapping[Hashable, str]) -> MetricResult:
        """Score images.

        Raises:
            ValueError: the ids differ.
        """
        rows = aligned(predictions, references)
        made = self.clip.embed_images([image for _, image, _ in rows])
        return _cosines("clip_text_image", rows, made, self.clip.embed_texts([text for _, _, text in rows]))


def _pooled(features: tuple[Any, ...] | BaseModelOutputWithPooling) -> torch.Tensor:
    """The projected vectors [N, D] in the outputs of CLIP."""
    assert isinstance(features, BaseModelOutputWithPooling)
    assert features.pooler_output is not None
    return features.pooler_output


def _cosines(name: str, rows: Sequence[tuple[Hashable, Any, Any]], a: torch.Tensor, b: torch.Tensor) -> MetricResult:
    return MetricResult.of_means({name: dict(zip((key for key, _, _ in rows), (a * b).sum(-1).tolist(), strict=True))})
