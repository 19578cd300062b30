"""Conversion of images to square arrays, by cropping or by stretching."""

from __future__ import annotations

import numpy as np
import PIL.Image

from ..io.images import MAX_PIXELS


def halved(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """Halve the image with a box filter while its shorter side is at least twice `size`."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    return image


def center_crop(image: PIL.Image.Image, size: int) -> np.ndarray:
    """The central square of an image at `size` pixels (docs/model.md, "Image preprocessing").

    While the shorter side is at least twice `size` the image is halved with a box filter; then it is resized
    bicubically until the shorter side is `size`, and cropped.

    Returns:
        uint8 [size, size, 3].
    """
    image = halved(image, size)
    scale = size / min(image.size)
    width, height = (max(round(side * scale), size) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height > MAX_PIXELS:  # a very long image: resize only the part that is kept
        kept = (
            left * image.width / width, top * image.height / height,
            (left + size) * image.width / width, (top + size) * image.height / height,
        )  # fmt: skip
        return np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC, box=kept))
    image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    return np.asarray(image)[top : top + size, left : left + size]


def squash(image: PIL.Image.Image, size: int) -> np.ndarray:
    """The whole image, resized bicubically to a square: uint8 [size, size, 3]. Relative boxes stay valid."""
    return np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC))


CROPS = {"center": center_crop, "squash": squash}


def to_pil(values: np.ndarray) -> PIL.Image.Image:
    """float [3, height, width] in [0, 1] to an image; rounds half up, as the original does."""
    pixels = (values.astype(np.float32) * 255 + 0.5).clip(0, 255).astype(np.uint8)
    return PIL.Image.fromarray(pixels.transpose(1, 2, 0))
