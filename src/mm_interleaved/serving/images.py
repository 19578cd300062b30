"""Images of requests and answers: checked by their header before a pixel is decoded, and encoded for answers."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import PIL.Image

from ..io import InputError
from ..io.images import load_image
from .budget import Share
from .config import LimitConfig
from .errors import ApiError

Format = Literal["png", "jpeg", "webp"]
FORMATS: dict[str, bytes] = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF"}
DATA_URL = re.compile(r"data:(?P<type>[a-z]+/[a-z0-9.+-]+)?(?:;[a-z0-9=-]+)*;base64,", re.IGNORECASE)
TYPES = ("image/png", "image/jpeg", "image/jpg", "image/webp")
LEAST_SIDE = 2


@dataclass
class PixelBudget:
    """The images and pixels that a request still may have.

    Attributes:
        limits: the limits of a request.
        share: what the request holds of that which all requests may hold together.
        images, pixels: what was used.
    """

    limits: LimitConfig
    share: Share
    images: int = 0
    pixels: int = 0

    def take(self, image: PIL.Image.Image, param: str) -> None:
        """Count an image by its header.

        Raises:
            ApiError: it is one too many or too large.
            Overloaded: the images of all requests together take too much memory.
        """
        width, height = image.size
        if min(width, height) < LEAST_SIDE:
            raise ApiError(f"an image of {width} x {height} pixels is too small", param=param, code="image_too_small")
        if max(width, height) > self.limits.aspect * min(width, height):
            raise ApiError(f"an image of {width} x {height} pixels is too long; at most {self.limits.aspect:g} to 1",
                           param=param, code="invalid_image")  # fmt: skip
        if getattr(image, "n_frames", 1) > 1:
            raise ApiError("an image with several frames; send one of them", param=param, code="invalid_image")
        self.images, self.pixels = self.images + 1, self.pixels + width * height
        if self.images > self.limits.images:
            raise ApiError(f"more than {self.limits.images} images", param=param, code="too_many_images")
        if self.pixels > self.limits.pixels:
            raise ApiError(f"the images have more than {self.limits.pixels / 1e6:g} million pixels together",
                           param=param, code="image_too_large")  # fmt: skip
        self.share.take(pixels=width * height)


def decode_data_url(url: str, param: str) -> bytes:
    """The bytes of a `data:` URL.

    Raises:
        ApiError: it is none of an image in base64.
    """
    head = DATA_URL.match(url[:200])
    if head is None:
        raise ApiError("not a data: URL of an image in base64", param=param, code="invalid_image_url")
    if (kind := head["type"]) is not None and kind.lower() not in TYPES:
        raise ApiError(f"images of type {kind[:50]} are not accepted; send PNG, JPEG or WebP", param=param,
                       code="unsupported_image_media_type")  # fmt: skip
    return decode_base64(url[head.end() :], param)


def decode_base64(text: str, param: str) -> bytes:
    """The bytes of a text in base64.

    Raises:
        ApiError: it is not base64, or empty.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError("not valid base64", param=param, code="invalid_base64_image") from None
    if not data:
        raise ApiError("the image is empty", param=param, code="empty_image_file")
    return data


def read_image(data: bytes, param: str, budget: PixelBudget) -> PIL.Image.Image:
    """The image in a file's bytes as upright RGB.

    Args:
        data: a PNG, JPEG or WebP file.
        param: the field it came in, for errors.
        budget: what the request may have; checked before pixels are decoded.

    Raises:
        ApiError: it is of another format, damaged, animated or too large.
    """
    if not data:
        raise ApiError("the image is empty", param=param, code="empty_image_file")
    if not any(data.startswith(start) for start in FORMATS.values()):
        raise ApiError("the image is not PNG, JPEG or WebP", param=param, code="invalid_image_format")
    damaged = ApiError("the image cannot be read; it is damaged or truncated", param=param, code="image_parse_error")
    try:
        image = PIL.Image.open(BytesIO(data), formats=tuple(FORMATS))
    except PIL.Image.DecompressionBombError:
        raise ApiError("the image has too many pixels", param=param, code="image_too_large") from None
    except (OSError, ValueError, SyntaxError, RuntimeError, MemoryError, LookupError, TypeError, AttributeError):
        raise damaged from None
    budget.take(image, param)
    try:
        return load_image(image)
    except InputError:
        raise damaged from None


def encode(image: PIL.Image.Image, kind: Format = "png", compression: int | None = None) -> str:
    """An image in base64.

    Args:
        image: the image.
        kind: format of the file.
        compression: quality of JPEG and WebP, 0 to 100; None: 90 (WebP: lossless).
    """
    options: dict[str, object] = {}
    if kind == "webp" and compression is None:
        options["lossless"] = True
    elif kind != "png":
        options["quality"] = 90 if compression is None else max(compression, 1)
    file = BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def encode_preview(image: PIL.Image.Image, most: int) -> str:
    """A JPEG of at most `most` bytes in base64, coarser or smaller if need be."""
    quality = 85
    while True:
        file = BytesIO()
        image.save(file, "jpeg", quality=quality)
        if len(file.getvalue()) <= most or min(image.size) <= 16:
            return base64.b64encode(file.getvalue()).decode()
        if quality > 40:
            quality -= 15
        else:
            image = image.resize((image.width // 2, image.height // 2))
