"""Conversion of images to square arrays, by cropping or by stretching."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image

from ..document.transform import WHOLE, Region, Transform
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


def squash(image: PIL.Image.Image, size: int, region: Region | None = None) -> np.ndarray:
    """The whole image, or a region in pixels, resized bicubically to a square: uint8 [size, size, 3].

    Boxes in shares of the image's sides stay valid.
    """
    return np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC, box=region))


CROPS = {"center": center_crop, "squash": squash}


def transformed(
    image: PIL.Image.Image, sizes: Sequence[int], crop: str, transform: Transform | None = None
) -> list[np.ndarray]:
    """An image as square arrays of several sizes, all with the same transform.

    Args:
        image: an upright RGB image.
        sizes: their sides in pixels.
        crop: how it becomes square if the transform does not say: a key of `CROPS`.
        transform: the transform; None: the whole image.

    Returns:
        uint8 [size, size, 3] for every size.
    """
    transform = transform or Transform()
    sides = (image.width, image.height, image.width, image.height)
    x1, y1, x2, y2 = (share * side for share, side in zip(transform.region, sides, strict=True))
    if (transform.square or crop) == "squash":
        made = [squash(image, size, (x1, y1, x2, y2)) for size in sizes]
    else:
        if transform.region != WHOLE:  # at least one pixel
            left, top = min(round(x1), image.width - 1), min(round(y1), image.height - 1)
            image = image.crop((left, top, max(round(x2), left + 1), max(round(y2), top + 1)))
        image = halved(image, max(sizes))  # all sizes share the first halvings
        made = [center_crop(image, size) for size in sizes]
    return [np.ascontiguousarray(pixels[:, ::-1]) for pixels in made] if transform.flip else made


def to_pil(values: np.ndarray) -> PIL.Image.Image:
    """float [3, height, width] in [0, 1] to an image; rounds half up, as the original does."""
    pixels = (values.astype(np.float32) * 255 + 0.5).clip(0, 255).astype(np.uint8)
    return PIL.Image.fromarray(pixels.transpose(1, 2, 0))
