"""One captured training step: losses, gradients and update of a batch of fixed sizes, started by a single launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_interleaved.model import MMInterleavedModel
from mm_interleaved.model.image_decoder import NoiseSamples
from mm_interleaved.model.static import capture
from mm_interleaved.model.visual_tokenizer import VisualFeatures

from .autoencoder import AutoencoderTask
from .compose import Composer
from .heads import Readers
from .optimizer import CapturableOptimizer
from .ranks import Ranks
from .rows import RowBatch, rebuilt, tensors_of

Measures = dict[str, Tensor]  # scalars; "loss" is what is minimised


@dataclass(frozen=True)
class Weights:
    """Weights of the losses of a stage.

    Attributes:
        text, image: of the model's own losses.
        images: of what image features tell.
        conditions: of what conditions tell.
    """

    text: float = 1.0
    image: float = 5.0
    images: float = 0.1
    conditions: float = 0.1


class DocumentTask(nn.Module):
    """The model with its readers, on batches of rows.

    Args:
        model: to be trained.
        readers: asked where `weights` says so.
        weights: of the losses.
    """

    def __init__(self, model: MMInterleavedModel, readers: Readers, weights: Weights) -> None:
        super().__init__()
        self.model, self.readers, self.weights = model, readers, weights
        self.asking: Tensor  # how much the readers' losses count at the moment, filled by the host
        self.register_buffer("asking", torch.ones(()), persistent=False)
        self._features: list[VisualFeatures] = []
        self._conditions: list[Tensor] = []
        model.visual_tokenizer.register_forward_hook(self._keep_features)
        model.image_decoder.resampler.register_forward_hook(self._keep_conditions)

    def _keep_features(self, module: nn.Module, given: object, features: Any) -> None:
        self._features.append(features)

    def _keep_conditions(self, module: nn.Module, given: object, conditions: Any) -> None:
        self._conditions.append(conditions)

    def forward(self, batch: RowBatch, pixels: Tensor) -> Measures:
        """Losses of a batch with its images, uint8 [I, 3, side, side]."""
        weights = self.weights
        self._features.clear()
        self._conditions.clear()
        count = len(batch.layout.earlier.images)
        found = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, layout=batch.layout, pixel_values=pixels,
            target_pixel_values=pixels, image_loss_mask=batch.image_loss_mask, loss_text_weight=weights.text,
            loss_image_weight=weights.image, noise_samples=sample_noise(self.model, count, pixels.device),
            return_logits=False,
        )  # fmt: skip
        total = found.loss
        measures = {"text": found.loss_txt, "image": found.loss_img}
        if weights.images:
            seen = self._features[0]
            loss, right = self.readers.of_images(seen.tokens, seen.pyramid, batch.geometry, batch.traits)
            total = total + self.asking * weights.images * loss
            measures |= {"images": loss, **right}
        if weights.conditions:
            loss, right = self.readers.of_conditions(self._conditions[0], batch.stated, batch.ground)
            total = total + self.asking * weights.conditions * loss
            measures |= {"conditions": loss, **right}
        return {"loss": total, **{name: value for name, value in measures.items() if value is not None}}


def sample_noise(model: MMInterleavedModel, count: int, device: torch.device) -> NoiseSamples:
    """Noise samples from the device's own generator, which captured steps advance; times are spread evenly."""
    decoder = model.image_decoder
    shape, last = decoder.latent_shape(count), decoder.config.scheduler["num_train_timesteps"]
    times = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    times = times[torch.randperm(count, device=device)] if device.type != "cuda" else _shuffled(times)
    return NoiseSamples(
        unconditional=torch.rand(count, device=device),
        posterior=torch.randn(shape, device=device),
        noise=torch.randn(shape, device=device),
        timesteps=(times * last).long().clamp(max=last - 1),
    )


def _shuffled(x: Tensor) -> Tensor:
    """In random order; sorting can be captured, `randperm` not everywhere."""
    return x[torch.rand(len(x), device=x.device).argsort()]


class PixelTask(nn.Module):
    """The autoencoder on images alone."""

    def __init__(self, task: AutoencoderTask) -> None:
        super().__init__()
        self.task = task

    def forward(self, batch: object, pixels: Tensor) -> Measures:
        """Losses of images, uint8 [I, 3, side, side]."""
        vae = self.task.vae
        side = pixels.shape[-1] >> (len(vae.config["block_out_channels"]) - 1)
        noise = torch.randn(len(pixels), vae.config["latent_channels"], side, side, device=pixels.device)
        wanted = (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        return dict(vars(self.task(wanted, noise)))


class TrainStep:
    """Computes, differentiates and updates; captured on a CUDA device.

    With several processes gradients and update are two graphs, and the sum over the processes runs between them. That
    costs one launch more than a captured sum, and leaves the communication outside of the capture.

    Args:
        task: (batch, pixels) to measures.
        optimizer: over its parameters.
        composer: makes the pixels.
        batch: an example of what will come; all others have its sizes.
        ranks: whose gradients are averaged; default: this process alone.
    """

    def __init__(
        self, task: Callable[[Any, Tensor], Measures], optimizer: CapturableOptimizer, composer: Composer, batch: Any,
        ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.task, self.optimizer, self.composer = task, optimizer, composer
        self.ranks = ranks or Ranks(composer.device)
        self.batch = rebuilt(batch, (x.to(composer.device, copy=True) for x in tensors_of(batch)))
        self.pixels = composer(batch.pictures)
        self.measures: Measures = {}
        parts = [self._whole] if self.ranks.world == 1 else [self._differentiate, self._average, self._update]
        self._parts: Sequence[Callable[[], object]] = parts
        if composer.device.type == "cuda":
            self._parts = [self._captured(part) for part in parts]

    def __call__(self, batch: Any, rate: float) -> Measures:
        """One update; what it returns is overwritten by the next."""
        for fixed, given in zip(tensors_of(self.batch), tensors_of(batch), strict=True):
            if fixed.shape != given.shape:
                raise ValueError(
                    f"a batch has a tensor of {list(given.shape)}, the step was captured for {list(fixed.shape)}"
                )
            fixed.copy_(given, non_blocking=True)
        self.composer(batch.pictures, out=self.pixels)
        self.optimizer.rate.fill_(rate)
        for part in self._parts:
            part()
        return self.measures

    def _captured(self, part: Callable[[], None]) -> Callable[[], object]:
        part()  # makes the tensors that measures are written to; the next part begins from what it leaves
        return part if part == self._average else capture(part, self.composer.device)

    def _whole(self) -> None:
        self._differentiate()
        self._update()

    def _differentiate(self) -> None:
        with torch.enable_grad():
            found = self.task(self.batch, self.pixels)
            gradients = torch.autograd.grad(found["loss"], self.optimizer.weights, allow_unused=True)
        self.optimizer.take(gradients)
        self._note({name: value.detach().float() for name, value in found.items()})

    def _average(self) -> None:
        self.ranks.average_(self.optimizer.gradient)

    def _update(self) -> None:
        self._note({"norm": self.optimizer.update()})

    def _note(self, found: Measures) -> None:
        for name, value in found.items():
            if name not in self.measures:
                self.measures[name] = value.clone()
            self.measures[name].copy_(value)


def means(kept: Sequence[Measures]) -> dict[str, float]:
    """Means over some steps, fetched at once."""
    names = list(kept[0])
    table = torch.stack([torch.stack([one[name] for name in names]) for one in kept])
    return dict(zip(names, table.mean(0).tolist(), strict=True))
