"""Opens image files. Headers are checked first, and every error of a decoder is raised as an `InputError`."""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import cast

import PIL.Image
from PIL.Image import Transpose

from .errors import InputError
from .paths import FileSlice

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs (about 13400 x 13400)
ImageSource = str | Path | FileSlice | bytes | PIL.Image.Image
# Decoders raise many types of errors for damaged data: struct.error and zlib.error for headers, RuntimeError for AVIF,
# AssertionError and ValueError for closed images.
_DECODER_ERRORS = (ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError,
                   NameError, OSError, RuntimeError, SyntaxError, TypeError, ValueError, Warning, struct.error,
                   zlib.error)  # fmt: skip
_ORIENTATION = 0x0112  # the EXIF tag
_QUARTER_TURNS = (Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)


def open_image(source: ImageSource, where: str = "") -> PIL.Image.Image:
    """Open an image and read its header, but not its pixels.

    Args:
        source: a path, a part of a file, the bytes of a file, or an image.
        where: the place to name in errors.

    Raises:
        InputError: it is missing, empty, without pixels, too large, closed, or in a format that Pillow cannot read.
    """
    with _explained(source, where):
        if isinstance(source, PIL.Image.Image):
            image = source
        else:
            data = source.read() if isinstance(source, FileSlice) else source
            image = PIL.Image.open(BytesIO(data) if isinstance(data, bytes) else data)
        if not image.width * image.height:
            raise InputError(f"{_name(source)} has no pixels ({image.width} x {image.height})", where, "Leave it out",
                             "unreadable")  # fmt: skip
        if image.width * image.height > MAX_PIXELS:
            raise PIL.Image.DecompressionBombError
        return image


def upright_size(source: ImageSource, where: str = "") -> tuple[int, int]:
    """Width and height of an image in its upright orientation, which boxes refer to. Reads only the header.

    Raises:
        InputError: as `open_image`.
    """
    image = open_image(source, where)
    try:
        width, height = image.size
        return (height, width) if _turn(image) in _QUARTER_TURNS else (width, height)
    finally:
        if image is not source:
            image.close()


def load_pixels(source: ImageSource, where: str = "", draft: int | None = None) -> PIL.Image.Image:
    """Load the first frame of an image in its stored mode and orientation. For label maps.

    Args:
        source, where: as of `open_image`.
        draft: decode a JPEG at a fraction of its size, as long as both sides keep this many pixels. Faster for large
            images; the pixels differ a little.

    Raises:
        InputError: as `open_image`, or its pixels are damaged or truncated.
    """
    image = open_image(source, where)
    with _explained(source, where):
        if draft:
            image.draft(None, (draft, draft))
        image.load()
    return image


def load_image(source: ImageSource, where: str = "", draft: int | None = None) -> PIL.Image.Image:
    """Load the first frame as an upright 8-bit RGB image. The arguments are those of `load_pixels`.

    Raises:
        InputError: as `load_pixels`, or the values of its mode have no known range.
    """
    image = load_pixels(source, where, draft)
    with _explained(source, where):
        turn = _turn(image)
        return _to_rgb(image if turn is None else image.transpose(PIL.Image.Transpose(turn)))


def _turn(image: PIL.Image.Image) -> int | None:
    """The `Transpose` that makes an image upright; None: it is upright, or its EXIF data cannot be read.

    Only the orientation tag is read. `ImageOps.exif_transpose` rewrites all other fields too, which fails if a camera
    wrote an invalid one.
    """
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except _DECODER_ERRORS as error:
        logger.debug("EXIF data left out: %s", error)
        return None
    turns = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
             5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
             8: Transpose.ROTATE_90}  # fmt: skip
    return turns.get(orientation) if isinstance(orientation, int) else None


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert to 8-bit RGB. Pillow clips 16-bit greys to white; here they are scaled.

    Raises:
        InputError: the range of the values is unknown.
    """
    if image.mode == "F":
        raise InputError("an image of mode F has no known range", fix="Convert it to mode L or RGB", kind="unreadable")
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = image.convert("I")
        least, most = cast("tuple[int, int]", grey.getextrema())
        if image.mode == "I" and (least < 0 or most > 65535 or 0 < most <= 255):
            raise InputError(f"an image of mode I with values from {least} to {most} has no known range",
                             fix="Convert it to mode L (0 to 255) or I;16 (0 to 65535)", kind="unreadable")  # fmt: skip
        return grey.point([(value + 128) // 257 for value in range(65536)], "L").convert("RGB")
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")


@contextmanager
def _explained(source: ImageSource, where: str) -> Iterator[None]:
    """Raise every error of Pillow as an `InputError`."""
    name = _name(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and invalid EXIF data, which are read nevertheless
            yield
    except InputError as error:
        raise (error if error.where or not where else error.at(where)) from None
    except FileNotFoundError:
        raise InputError(f"{name} does not exist", where, "Check the path", "missing") from None
    except PIL.UnidentifiedImageError:
        if _is_empty(source):
            raise InputError(f"{name} is empty (0 bytes)", where, "Save it as PNG or JPEG", "empty") from None
        raise InputError(f"{name} is not an image that can be read", where, "Save it as PNG or JPEG",
                         "unreadable") from None  # fmt: skip
    except PIL.Image.DecompressionBombError:
        raise InputError(f"{name} has more than {MAX_PIXELS / 1e6:.0f} million pixels", where, "Scale it down",
                         "too large") from None  # fmt: skip
    except _DECODER_ERRORS as error:
        if isinstance(source, PIL.Image.Image) and (isinstance(error, AssertionError) or "closed" in str(error)):
            raise InputError(f"the file of {name} is closed", where,
                             "Call load() before it is closed, or give its path", "unreadable") from None  # fmt: skip
        if isinstance(error, OSError) and error.strerror:  # from the system, not from a decoder
            raise InputError(f"{name} cannot be read: {error.strerror}", where, "Check the path",
                             "unreadable") from None  # fmt: skip
        reason = str(error) or type(error).__name__
        raise InputError(f"{name} is damaged: {reason}", where, "Restore it from its source", "unreadable") from None


def _name(source: ImageSource) -> str:
    return f"'{str(source)[:200]}'" if isinstance(source, (str, Path, FileSlice)) else "the image"


def _is_empty(source: ImageSource) -> bool:
    if isinstance(source, (str, Path)):
        return Path(source).stat().st_size == 0
    return not source.length if isinstance(source, FileSlice) else isinstance(source, bytes) and not source
