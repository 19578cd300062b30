"""Images in files become arrays: reading with clear errors, and the two ways of fitting an image into a square."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from ..document import DocumentError, FileSlice
from ..document.errors import UNREADABLE_IMAGE

Source = str | Path | FileSlice | PIL.Image.Image  # of an image

MAX_PIXELS = 178_956_970  # where PIL itself suspects a decompression bomb (about 13400 x 13400)


def open_image(source: Source, where: str = "") -> PIL.Image.Image:
    """An image whose header has been read, but not yet its pixels.

    Raises:
        DocumentError: missing, empty, without pixels, too large, closed, or in no format that PIL reads.
    """
    with _explained(source, where), warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        if isinstance(source, PIL.Image.Image):
            image = source
        else:
            image = PIL.Image.open(BytesIO(source.read()) if isinstance(source, FileSlice) else source)
        if not image.width * image.height:
            raise DocumentError(
                f"{_name(source)} has no pixels ({image.width} x {image.height})", where, "Leave it out"
            )
        if image.width * image.height > MAX_PIXELS:
            raise PIL.Image.DecompressionBombError
        return image


def load_image(source: Source, where: str = "", draft: int | None = None) -> PIL.Image.Image:
    """An RGB image from a file or a PIL image: the first frame, upright, at 8 bits a channel.

    Args:
        source: where it is.
        where: the place to name in errors.
        draft: decode a JPEG at a fraction of its size, as long as both sides keep this many pixels. Faster for large
            images; the pixels differ a little.

    Raises:
        DocumentError: missing, empty, truncated, too large, closed, in no format that PIL reads, or in a mode whose
            values have no known range.
    """
    image = open_image(source, where)
    with _explained(source, where):
        if draft:
            image.draft(None, (draft, draft))
        if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:  # else transposing would only copy
            image = PIL.ImageOps.exif_transpose(image)
        return _to_rgb(image)


@contextmanager
def _explained(source: Source, where: str) -> Iterator[None]:
    """What PIL raises as errors for people."""
    name = _name(source)
    try:
        yield
    except DocumentError as error:
        raise (error if error.where or not where else error.at(where)) from None
    except FileNotFoundError:
        raise DocumentError(f"{name} does not exist", where, "Check the path") from None
    except PIL.UnidentifiedImageError:
        empty = _size(source) == 0
        problem = "is empty (0 bytes)" if empty else "is not an image that can be read"
        raise DocumentError(f"{name} {problem}", where, "Save it as PNG or JPEG") from None
    except PIL.Image.DecompressionBombError:
        raise DocumentError(
            f"{name} has more than {MAX_PIXELS / 1e6:.0f} million pixels", where, "Scale it down"
        ) from None
    except UNREADABLE_IMAGE as error:
        if isinstance(source, PIL.Image.Image) and (isinstance(error, AssertionError) or "closed" in str(error)):
            raise DocumentError(f"the file of {name} is closed", where,
                                "Call load() before it is closed, or give its path") from None  # fmt: skip
        if isinstance(error, OSError) and error.strerror:  # from the system, not from a decoder
            raise DocumentError(f"{name} cannot be read: {error.strerror}", where, "Check the path") from None
        reason = str(error) or type(error).__name__
        raise DocumentError(f"{name} is damaged: {reason}", where, "Restore it from its source") from None


def _name(source: Source) -> str:
    return "the image" if isinstance(source, PIL.Image.Image) else f"'{str(source)[:200]}'"


def _size(source: Source) -> int | None:
    if isinstance(source, FileSlice):
        return source.length
    return None if isinstance(source, PIL.Image.Image) else Path(source).stat().st_size


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """8-bit RGB. PIL clips 16-bit greys to white; they are scaled here instead.

    Raises:
        DocumentError: it is unknown which value is white.
    """
    if image.mode == "F":
        raise DocumentError("an image of mode F has no known range", fix="Convert it to mode L or RGB")
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.float64)
        least, most = grey.min(), grey.max()
        if image.mode == "I" and (least < 0 or most > 65535 or 0 < most <= 255):
            raise DocumentError(f"an image of mode I with values from {least:.0f} to {most:.0f} has no known range",
                                fix="Convert it to mode L (0 to 255) or I;16 (0 to 65535)")  # fmt: skip
        return PIL.Image.fromarray((grey / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "RGB":
        image.load()
        return image
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")


def halved(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The image, halved with a box filter while its shorter side is at least twice `size`."""
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
    if width * height > MAX_PIXELS:  # an endless ribbon: resize only the part that is kept
        kept = (
            left * image.width / width, top * image.height / height,
            (left + size) * image.width / width, (top + size) * image.height / height,
        )  # fmt: skip
        return np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC, box=kept))
    image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    return np.asarray(image)[top : top + size, left : left + size]


def squash(image: PIL.Image.Image, size: int) -> np.ndarray:
    """The whole image, stretched bicubically to a square: uint8 [size, size, 3]. Keeps boxes valid."""
    return np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC))


CROPS = {"center": center_crop, "squash": squash}


def to_array(image: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3] to float32 [3, height, width] in [0, 1]."""
    return image.transpose(2, 0, 1).astype(np.float32) / 255


def to_pil(values: np.ndarray) -> PIL.Image.Image:
    """float [3, height, width] in [0, 1] to an image; rounds half up, as the release does."""
    pixels = (values.astype(np.float32) * 255 + 0.5).clip(0, 255).astype(np.uint8)
    return PIL.Image.fromarray(pixels.transpose(1, 2, 0))
