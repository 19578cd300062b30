"""Images: readable pixels are read whatever stands beside them, and damage is one kind of error."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mm_interleaved.io import FileSlice, InputError
from mm_interleaved.io.images import load_image, load_pixels, open_image

CASES = Path(__file__).parent / "cases"
FORMATS = ("PNG", "WEBP", "JPEG", "TIFF", "AVIF", "GIF", "BMP")
# EXIF data with nothing but an orientation, and with an exposure time that lies nowhere
TURNED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0%c\0\0\0\0\0\0\0"
BAD_FIELD = (b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
             b"\x9a\x82\x05\0\xff\0\0\0\xff\xff\xff\0")  # fmt: skip


def image() -> PIL.Image.Image:
    """40 x 20 pixels, the left half blue, the rest red."""
    found = PIL.Image.new("RGB", (40, 20), (250, 10, 10))
    found.paste((10, 10, 250), (0, 0, 20, 20))
    return found


def encoded(format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image().save(buffer, format, **options)
    return buffer.getvalue()


def test_a_sound_photo_with_an_odd_field_is_read_upright() -> None:
    """Pillow cannot write one of its EXIF fields back, and need not."""
    path = CASES / "exif-orientation-6-bad-field.jpg"
    stored, upright = load_pixels(path), load_image(path)
    assert (stored.size, upright.size) == ((40, 30), (30, 40))
    turned = np.rot90(np.asarray(stored.convert("RGB")), -1)
    assert np.array_equal(np.asarray(upright), turned)


def test_a_damaged_avif_is_an_image_that_cannot_be_read() -> None:
    with pytest.raises(InputError, match=r"damaged\.avif' is damaged: .*Restore it") as caught:
        load_image(CASES / "damaged.avif", "here")
    assert (caught.value.kind, caught.value.where) == ("unreadable", "here")


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation(format: str, orientation: int) -> None:
    """As Pillow turns images whose EXIF data are in order."""
    from PIL import ImageOps

    data = encoded(format, exif=TURNED % orientation)
    with PIL.Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened.convert("RGB") if format != "TIFF" else opened)
    assert np.array_equal(np.asarray(load_image(data)), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG", "TIFF", "AVIF"])
def test_an_odd_field_beside_the_orientation(format: str) -> None:
    assert load_image(encoded(format, exif=BAD_FIELD)).size == (20, 40)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("junk", [b"Exif\0\0junkjunkjunk", b"junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0"])
def test_junk_in_the_place_of_exif_data_is_left_out(format: str, junk: bytes) -> None:
    data = encoded(format, exif=junk)
    assert np.array_equal(np.asarray(load_image(data)), np.asarray(load_image(encoded(format))))


def outcome(content: bytes) -> str:
    """The mode of an image, or the kind of problem."""
    try:
        return load_image(content).mode
    except InputError as error:
        return error.kind


@pytest.mark.parametrize("format", FORMATS)
def test_whatever_is_cut_off_or_changed_is_read_or_refused_in_words(format: str) -> None:
    data, chance = encoded(format), random.Random(0)
    damaged = [data[:length] for length in range(0, len(data), max(len(data) // 60, 1))]
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(3):
            changed[chance.randrange(len(data))] = chance.randrange(256)
        damaged.append(bytes(changed))
    found = [outcome(content) for content in damaged]
    assert {*found} <= {"RGB", "empty", "unreadable", "too large"}
    assert sum(what != "RGB" for what in found) > 10


def test_parts_of_files(tmp_path: Path) -> None:
    data = encoded("PNG")
    (tmp_path / "a.tar").write_bytes(b"x" * 100 + data + b"y" * 100)
    assert load_image(FileSlice(tmp_path / "a.tar", 100, len(data))).size == (40, 20)
    with pytest.raises(InputError, match=r"a\.tar@100' is damaged"):
        load_image(FileSlice(tmp_path / "a.tar", 100, 60))
    with pytest.raises(InputError, match="is empty") as caught:
        load_image(FileSlice(tmp_path / "a.tar", 100, 0))
    assert caught.value.kind == "empty"


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("text")
    for name, kind in (("empty.png", "empty"), ("text.png", "unreadable"), ("none.png", "missing"), (".", "unreadable"),
                       ("a\0b", "unreadable"), ("\ud83d", "unreadable"), ("a" * 300, "unreadable")):  # fmt: skip
        with pytest.raises(InputError) as caught:
            open_image(tmp_path / name)
        assert caught.value.kind == kind


def test_only_the_header_is_read_at_first(tmp_path: Path) -> None:
    data = encoded("JPEG")
    (tmp_path / "cut.jpg").write_bytes(data[:-100])
    assert open_image(tmp_path / "cut.jpg").size == (40, 20)
    with pytest.raises(InputError, match="is damaged: image file is truncated"):
        load_image(tmp_path / "cut.jpg")


def test_sixteen_bit_greys_are_scaled() -> None:
    values = np.arange(0, 65536, 97, dtype=np.uint16)[:600].reshape(20, 30)
    expected = (values.astype(np.float64) / 257).round().astype(np.uint8)
    for stored in (PIL.Image.fromarray(values), PIL.Image.fromarray(values.astype(np.int32))):
        assert np.array_equal(np.asarray(load_image(stored)), np.repeat(expected[..., None], 3, -1))
