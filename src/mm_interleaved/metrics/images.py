"""Fréchet distance between sets of images (FID), at the release's 64 pixels and at native resolution."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from ..io import write_atomic
from .image_files import ImageLike, rgb
from .inception import FIDInception
from .result import MetricResult, MissingRequirement, aligned, reports_missing

COMPATIBLE = 64  # the release resizes all images to this many pixels, so its FIDs are not comparable with others
Extractor = Callable[[torch.Tensor], torch.Tensor]
"""Images, float32 [B, 3, H, W] in [0, 1], to features [B, D]. An `nn.Module` runs on the metric's device."""


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and unbiased covariance [D, D] of features, float64, and the number of images."""

    mu: np.ndarray
    sigma: np.ndarray
    count: int

    @classmethod
    def of(cls, features: np.ndarray) -> Statistics:
        """The statistics of features [N, D] of at least two images.

        Raises:
            MissingRequirement: there are fewer than two images.
        """
        if len(features) < 2:
            raise MissingRequirement(f"FID needs two images or more, got {len(features)}", "score more samples")
        exact = features.astype(np.float64)
        return cls(exact.mean(0), np.atleast_2d(np.cov(exact, rowvar=False)), len(exact))

    def save(self, path: Path, key: str) -> None:
        """Write an .npz with `mu`, `sigma`, `count` and the key of their origin atomically."""
        buffer = BytesIO()
        np.savez(buffer, mu=self.mu, sigma=self.sigma, count=self.count, key=key)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, key: str) -> Statistics:
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file has another format, or is of other images, features or pixels.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                found = {name: stored[name] for name in ("mu", "sigma", "count", "key")}
        except (KeyError, EOFError, ValueError, OSError) as error:
            raise ValueError(f"{path}: not a file of FID statistics ({error}); delete it or name another") from error
        if str(found["key"]) != key:
            raise ValueError(f"{path}: made from other images, weights or pixels; delete it or name another")
        return cls(found["mu"], found["sigma"], int(found["count"]))


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians (Heusel et al., arXiv 1706.08500).

    |mu1 - mu2|² + tr(sigma1 + sigma2 - 2 sqrt(sigma1 sigma2)). The trace of that root is the sum of the singular values
    of sqrt(sigma1) sqrt(sigma2). This needs neither the root of an asymmetric product nor regularisation.

    Args:
        mu1: mean [D].
        sigma1: covariance [D, D], symmetric, no eigenvalue below 0.
        mu2: mean of the other Gaussian.
        sigma2: covariance of the other Gaussian.
    """
    shared = np.linalg.svd(_root(sigma1) @ _root(sigma2), compute_uv=False).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * shared
    return max(float(distance), 0.0)  # rounding may make it negative


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(np.asarray(matrix, dtype=np.float64))
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def prepared(source: ImageLike, resolution: int | None) -> torch.Tensor:
    """The central square of an image, float32 [3, S, S] in [0, 1].

    Args:
        source: an image of any size and mode, or a file of one.
        resolution: S, to which the short side is first resized bicubically; None: no resizing.
    """
    image = rgb(source)
    if resolution is not None:
        short = min(image.size)
        width, height = (max(resolution, int(resolution * side / short)) for side in image.size)
        image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    side = min(image.size)
    left, top = (round((length - side) / 2) for length in image.size)
    cropped = np.array(image.crop((left, top, left + side, top + side)))
    return torch.from_numpy(cropped).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class FID:
    """Fréchet distance of generated images (by id) from reference images.

    Values: `fid_64`, the release's, and `fid_native`, of the central squares in their own size, which the network
    resizes to 299 pixels. There are no scores of single samples.

    Attributes:
        weights: file of the Inception weights; see `FIDInception.load`.
        extractor: another feature extractor; it needs its own `name`, since cached statistics depend on it.
        name: name of the features.
        cache: folder for cached statistics of the references.
        device: the device of the network.
        batch: number of images in a batch.
        resolutions: short sides to which images are resized; None: their own.
    """

    weights: Path | None = None
    extractor: Extractor | None = None
    name: str = "inception-2015-12-05"
    cache: Path | None = None
    device: torch.device | str = "cpu"
    batch: int = 50
    resolutions: tuple[int | None, ...] = (COMPATIBLE, None)

    @cached_property
    def _network(self) -> Extractor:
        network = FIDInception.load(self.weights) if self.extractor is None else self.extractor
        return network.to(self.device).eval() if isinstance(network, torch.nn.Module) else network

    @reports_missing
    def __call__(
        self, predictions: Mapping[Hashable, ImageLike], references: Mapping[Hashable, ImageLike]
    ) -> MetricResult:
        """Compare the sets.

        Raises:
            ValueError: the ids differ, or a file of cached statistics is of other images or features.
        """
        rows = aligned(predictions, references)
        values = {}
        for resolution in self.resolutions:
            fake = Statistics.of(self.features((image for _, image, _ in rows), resolution))
            real = self._reference([image for _, _, image in rows], resolution)
            label = "fid_native" if resolution is None else f"fid_{resolution}"
            values[label] = frechet_distance(fake.mu, fake.sigma, real.mu, real.sigma)
        return MetricResult(values)

    @torch.inference_mode()
    def features(self, images: Iterable[ImageLike], resolution: int | None) -> np.ndarray:
        """Features [N, D] of images. Consecutive images of equal size form a batch."""
        found, waiting = [], []

        def run() -> None:
            if waiting:
                found.append(self._network(torch.stack(waiting).to(self.device)).float().cpu().numpy())
                waiting.clear()

        for image in images:
            ready = prepared(image, resolution)
            if len(waiting) == self.batch or (waiting and waiting[0].shape != ready.shape):
                run()
            waiting.append(ready)
        run()
        return np.concatenate(found) if found else np.zeros((0, 0))

    def _reference(self, images: list[ImageLike], resolution: int | None) -> Statistics:
        """Statistics of the references, from the cache if it has them."""
        if self.cache is None:
            return Statistics.of(self.features(images, resolution))
        key = f"{self.name} {resolution or 'native'} {fingerprint(images)}"
        path = self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        if path.is_file():
            return Statistics.load(path, key)
        made = Statistics.of(self.features(images, resolution))
        made.save(path, key)
        return made


def fingerprint(images: Iterable[ImageLike]) -> str:
    """A hash of the images in order: of the name, size and modification time of files, of the pixels of others."""
    digest = hashlib.sha256()
    for image in images:
        if isinstance(image, PIL.Image.Image):
            digest.update(f"{image.size} {image.mode}".encode() + image.tobytes())
        else:
            about = image.stat()
            digest.update(f"{image.resolve()} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()
