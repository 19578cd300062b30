"""Reading images of all sorts, and the release's way of fitting them into a square."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_interleaved import MMInterleavedProcessor, MMInterleavedTokenizer
from mm_interleaved.document import Image
from mm_interleaved.io import InputError
from mm_interleaved.io.images import MAX_PIXELS, load_image
from mm_interleaved.processor.images import CROPS, center_crop, squash, to_pil

from ..conftest import make_image


@settings(max_examples=25)
@given(st.integers(1, 900), st.integers(1, 900), st.sampled_from([7, 56, 224]))
def test_center_crop_has_the_right_shape(width: int, height: int, size: int) -> None:
    crop = center_crop(make_image(size=(width, height)), size)
    assert crop.shape == (size, size, 3)
    assert crop.dtype == np.uint8


def test_center_crop_step_by_step() -> None:
    """640 x 480 to 112: halved twice with a box filter, then bicubic, then the middle."""
    image = make_image(size=(640, 480))
    halved = image.resize((320, 240), PIL.Image.Resampling.BOX).resize((160, 120), PIL.Image.Resampling.BOX)
    resized = halved.resize((round(160 * 112 / 120), 112), PIL.Image.Resampling.BICUBIC)
    left = (resized.width - 112) // 2
    expected = np.asarray(resized)[:, left : left + 112]
    assert np.array_equal(center_crop(image, 112), expected)


def test_center_crop_of_its_own_size_changes_nothing() -> None:
    image = make_image(size=(56, 56))
    assert np.array_equal(center_crop(image, 56), np.asarray(image))


def test_a_ribbon_is_cropped_without_being_blown_up() -> None:
    """One pixel high and very long: resizing it whole would take hundreds of gigabytes."""
    image = PIL.Image.linear_gradient("L").resize((100_000, 1)).convert("RGB")
    crop = center_crop(image, 224)
    assert crop.shape == (224, 224, 3)
    middle = np.asarray(image)[0, 50_000]
    assert np.abs(crop.astype(int) - middle).max() <= 2


def test_squash_keeps_the_whole_image() -> None:
    image = PIL.Image.new("RGB", (100, 10))
    image.paste((255, 0, 0), (90, 0, 100, 10))
    squashed = squash(image, 20)
    assert squashed.shape == (20, 20, 3)
    assert squashed[10, -1, 0] == 255


@given(st.integers(0, 255))
def test_arrays_and_images_round_trip(value: int) -> None:
    pixels = np.full((2, 3, 3), value, np.uint8)
    assert np.array_equal(np.asarray(to_pil(pixels.transpose(2, 0, 1) / np.float32(255))), pixels)


def test_to_image_rounds_half_up_and_clips() -> None:
    values = np.array([0.5 / 255, 0.49 / 255, -1.0, 2.0]).reshape(1, 2, 2).repeat(3, 0)
    assert np.asarray(to_pil(values))[..., 0].tolist() == [[1, 0], [0, 255]]


# ---- unusual files


def save(path: Path, image: PIL.Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_one_pixel(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", PIL.Image.new("RGB", (1, 1), (9, 8, 7)))
    assert np.array_equal(center_crop(load_image(path), 56), np.full((56, 56, 3), (9, 8, 7)))


def test_cmyk(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)))
    red, green, blue = load_image(path).getpixel((4, 4))
    assert red > 200
    assert green < 60
    assert blue < 60


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = PIL.Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4)
    loaded = load_image(save(tmp_path / "a.png", image, transparency=3))
    assert loaded.mode == "RGB"
    assert loaded.getpixel((4, 4)) == (10, 200, 30)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    path = save(tmp_path / "a.png", PIL.Image.fromarray(ramp))
    assert np.abs(np.asarray(load_image(path))[..., 0] - ramp / 257).max() <= 0.5


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert load_image(path).getpixel((4, 4))[0] > 200


def test_a_photograph_taken_sideways_stands_upright(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
    path = save(tmp_path / "a.jpg", PIL.Image.new("RGB", (40, 20)), exif=exif)
    assert load_image(path).size == (20, 40)


def test_grey_with_alpha(tmp_path: Path) -> None:
    assert load_image(save(tmp_path / "a.png", PIL.Image.new("LA", (4, 4), (77, 0)))).getpixel((0, 0)) == (77, 77, 77)


# ---- files that cannot be used


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.png' does not exist"):
        load_image(tmp_path / "gone.png")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(InputError, match=r"is empty \(0 bytes\)"):
        load_image(tmp_path / "a.png")


def test_no_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(InputError, match="not an image that can be read"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_truncated_file(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / f"a.{kind}", make_image(size=(300, 200)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"damaged|not an image"):
        load_image(path)


def test_every_truncation_is_refused_or_read(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.png", make_image(size=(30, 20))).read_bytes()
    read, told = 0, set()
    for length in range(len(whole)):
        (tmp_path / "b.png").write_bytes(whole[:length])
        try:
            found = load_image(tmp_path / "b.png")
        except InputError as error:
            told.add("b.png" in str(error))
        else:
            assert found.tobytes() == load_image(tmp_path / "a.png").tobytes()
            read += 1
    assert told == {True}
    assert read < 32  # only checksums and the closing mark, which follow the pixels, may be missing


def test_too_many_pixels_are_not_even_decoded(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", PIL.Image.new("1", (20_000, 20_000)))
    assert MAX_PIXELS < 20_000**2
    with pytest.raises(InputError, match="million pixels"):
        load_image(path)
    side = math.isqrt(MAX_PIXELS) - 10  # large, but allowed; PIL's warning about it stays away
    assert load_image(save(tmp_path / "b.png", PIL.Image.new("1", (side, 4)))).size == (side, 4)


@pytest.mark.parametrize("size", [(1000, 700), (90, 60), (57, 2000), (224, 224)])
@pytest.mark.parametrize("crop", ["center", "squash"])
def test_both_views_are_what_each_alone_would_be(
    tokenizer: MMInterleavedTokenizer, size: tuple[int, int], crop: str
) -> None:
    image = make_image(3, size)
    for sizes in ((56, 32), (32, 56), (48, 48)):
        processor = MMInterleavedProcessor(tokenizer, image_size=sizes[0], target_size=sizes[1], crop=crop)
        views = processor.views(Image(image), training=True)
        assert np.array_equal(views.input, CROPS[crop](image, sizes[0]))
        assert np.array_equal(views.target, CROPS[crop](image, sizes[1]))
        assert processor.views(Image(image), training=False).target is None
        other = processor.views(Image(image, target=make_image(4)), training=True)
        assert np.array_equal(other.target, CROPS[crop](make_image(4), sizes[1]))
