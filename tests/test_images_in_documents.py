"""Images of every kind in documents: taken rightly, or refused in words that say where."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_interleaved import Document, Image, MMInterleavedProcessor, Text
from mm_interleaved.io import InputError
from mm_interleaved.io.images import load_image

from .conftest import make_image


def pixels(image: Image) -> np.ndarray:
    return np.asarray(load_image(image.source))


SIDES = st.integers(1, 9)
CHANNELS = st.sampled_from([None, 1, 3, 4])


@settings(max_examples=60)
@given(SIDES, SIDES, CHANNELS, st.booleans(), st.sampled_from(["uint8", "float16", "float32", "float64", "bfloat16"]),
       st.integers(0, 2**32 - 1))  # fmt: skip
def test_arrays_and_tensors_keep_their_values(
    height: int, width: int, channels: int | None, as_tensor: bool, kind: str, seed: int
) -> None:
    shape = (height, width) if channels is None else (height, width, channels)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    expected = np.broadcast_to(values.reshape(height, width, -1)[..., :3], (height, width, 3))
    tensor = torch.from_numpy(values)
    given_ = tensor if kind == "uint8" else (tensor.float() / 255).to(getattr(torch, kind))
    if channels is not None and as_tensor:
        given_ = given_.permute(2, 0, 1)
    if not as_tensor:
        given_ = given_.numpy() if kind != "bfloat16" else given_.float().numpy()
    error = np.abs(pixels(Image(given_)).astype(int) - expected)
    assert error.max() <= (1 if kind == "bfloat16" else 0)


def test_an_image_does_not_change_with_its_array() -> None:
    for shape in ((4, 5), (4, 5, 3), (4, 5, 4)):
        array = np.zeros(shape, np.uint8)
        image = Image(array)
        array[:] = 255
        assert not pixels(image).any()


def test_arrays_of_any_strides() -> None:
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    assert np.array_equal(pixels(Image(array[::-1, ::2])), array[::-1, ::2])
    leaf = torch.rand(3, 4, 4, requires_grad=True)
    assert np.array_equal(pixels(Image(leaf)), pixels(Image(leaf.detach())))


def with_value(value: float) -> np.ndarray:
    array = np.full((4, 4, 3), 0.5, np.float32)
    array[1, 2, 0] = value
    return array


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (with_value(np.nan), "the array holds NaN or infinite values"),
        (with_value(np.inf), "the array holds NaN or infinite values"),
        (with_value(255.0), r"floats from 0\.5 to 255, outside \[0, 1\]. Divide by 255"),
        (with_value(-0.25), r"floats from -0\.25 to 0\.5, outside"),
        (torch.from_numpy(with_value(2.0)).permute(2, 0, 1), r"the tensor has floats from 0\.5 to 2"),
        (np.zeros((4, 4, 3), np.int64), "values of type int64. Give uint8"),
        (np.zeros((4, 4), bool), "values of type bool"),
        (np.zeros((4, 4), np.uint16), "values of type uint16"),
        (np.zeros((4, 4), object), "values of type object"),
        (np.zeros((4, 4), complex), "values of type complex128"),
        (
            np.zeros((4, 4, 2), np.uint8),
            r"an array of shape \[4, 4, 2\] is no image. Give \[height, width, 1, 3 or 4\]",
        ),
        (np.zeros((3, 8, 9), np.uint8), "Channels come last in an array"),
        (torch.zeros(8, 9, 3), "Channels come first in a tensor"),
        (torch.zeros(1, 3, 4, 4), r"a tensor of shape \[1, 3, 4, 4\] is no image. Give one image of the batch"),
        (np.zeros(5, np.uint8), r"shape \[5\] is no image"),
        (np.zeros((), np.uint8), r"shape \[\] is no image"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \[0, 4, 3\] has no pixels"),
        (torch.zeros(3, 4, 0), r"shape \[3, 4, 0\] has no pixels"),
        (torch.zeros(3, 4, 4, device="meta"), "the values of the tensor cannot be read"),
        (torch.zeros(4, 4).to_sparse(), "the values of the tensor cannot be read"),
        (b"junk", "not bytes. Bytes are opened with"),
        (io.BytesIO(b"junk"), "not BytesIO"),
        (7, "not int"),
        (["a.png"], "not list"),
        ("a\0.png", "the path holds a null character"),
    ],
)
def test_what_is_no_image_is_refused_when_it_is_made(source: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Image(source)
    with pytest.raises(InputError, match=words):
        Image(make_image(), target=source)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"segments": "A cat."}, "segments must be a list, not str"),
        ({"segments": Text("A cat.")}, "segments must be a list, not Text"),
        ({"segments": [Text("A cat."), "a.png"]}, r"segments\[1\]: must be a Text or an Image, not str"),
        ({"segments": [], "max_turns": 0}, "max_turns: must be at least 1"),
        ({"segments": [], "max_turns": 2.5}, "max_turns: must be a whole number"),
        ({"segments": [], "forced_texts": "A cat."}, "forced_texts: must be a list"),
    ],
)
def test_documents_are_checked_when_they_are_made(arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Document(**arguments)


def test_texts_and_roles_are_checked_when_they_are_made() -> None:
    with pytest.raises(InputError, match="a text must be a string or None, not bytes"):
        Text(b"A cat.")
    with pytest.raises(InputError, match=r"lone surrogate \\ud83d \(half a character\) at position 2"):
        Text("A \ud83d")
    for kind in (Text, Image):
        with pytest.raises(InputError, match="unknown role 'robot'"):
            kind(role="robot")


def closed_file(folder: Path) -> PIL.Image.Image:
    make_image().save(folder / "a.png")
    with PIL.Image.open(folder / "a.png") as image:
        return image


def closed_stream(folder: Path) -> PIL.Image.Image:
    make_image().save(folder / "a.png")
    with (folder / "a.png").open("rb") as stream:
        return PIL.Image.open(stream)


def closed_image(folder: Path) -> PIL.Image.Image:
    image = make_image()
    image.close()
    return image


def junk(folder: Path) -> Path:
    (folder / "a.png").write_bytes(b"junk" * 50)
    return folder / "a.png"


def truncated(folder: Path) -> Path:
    make_image().save(folder / "a.png")
    data = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(data[: len(data) // 2])
    return folder / "a.png"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (closed_file, "the file of the image is closed"),
        (closed_stream, "the file of the image is closed"),
        (closed_image, "the file of the image is closed"),
        (junk, "is not an image that can be read"),
        (truncated, "is damaged"),
        (lambda folder: folder, "cannot be read: Is a directory"),
        (lambda folder: folder / "absent.png", "does not exist"),
        (lambda folder: PIL.Image.new("RGB", (0, 5)), r"the image has no pixels \(0 x 5\)"),
        (lambda folder: PIL.Image.new("F", (4, 4)), "an image of mode F has no known range"),
        (
            lambda folder: PIL.Image.new("I", (4, 4), 70_000),
            "mode I with values from 70000 to 70000 has no known range",
        ),
        (lambda folder: PIL.Image.new("I", (4, 4), 200), "mode I with values from 200 to 200 has no known range"),
        (lambda folder: PIL.Image.new("I", (4, 4), -1), "mode I with values from -1 to -1"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_errors_name_document_and_segment(
    processor: MMInterleavedProcessor, tmp_path: Path, make: object, words: str
) -> None:
    document = Document([Text("A cat."), Image(make_image()), Image(make(tmp_path))])
    with pytest.raises(InputError, match=words) as caught:
        processor([Document([Text("Fine.")]), document])
    assert caught.value.where == "document 1, segments[2]"
    streams = [processor.encode(document.segments)]
    with pytest.raises(InputError, match=words) as caught:
        processor.collate(streams)
    assert caught.value.where == "row 0, image 1"


def test_errors_name_the_target_and_the_part_of_a_chat(processor: MMInterleavedProcessor, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        processor(Document([Image(make_image(), target=junk(tmp_path))]), training=True)
    assert caught.value.where == "document 0, segments[0], target"
    part = {"type": "image", "image": np.zeros((2, 2, 2), np.uint8)}
    with pytest.raises(InputError) as caught:
        Document.from_messages([{"role": "user", "content": [{"type": "text", "text": "Who?"}, part]}])
    assert caught.value.where == "messages[0].content[1].image"


MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "La", "RGBX", "RGBa", "PA", "I;16", "I;16B"]


@pytest.mark.parametrize("mode", MODES)
def test_modes_become_rgb(mode: str) -> None:
    assert load_image(PIL.Image.new(mode, (3, 2))).mode == "RGB"


@pytest.mark.parametrize("value", [0, 255, 300, 65_535])
def test_sixteen_bits_in_32(value: int) -> None:
    """Mode I holds 16 bits a pixel where files of 16 bits are read so; small values may as well be 8 bits."""
    image = PIL.Image.new("I", (2, 2), 65_535)
    image.putpixel((0, 0), value)
    assert load_image(image).getpixel((0, 0)) == (round(value / 257),) * 3


def test_errors_survive_pickling() -> None:
    error = InputError("is damaged", "segments[1]", "Restore it").at("document 0")
    again = pickle.loads(pickle.dumps(error))
    assert (again.problem, again.where, again.fix, str(again)) == (error.problem, error.where, error.fix, str(error))


FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    make_image(size=(24, 16)).save(buffer, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
    return buffer.getvalue()


FILES = {kind: encoded(kind) for kind in FORMATS}


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150)
@given(st.sampled_from(FORMATS), st.data())
def test_damaged_bytes_give_an_image_or_an_error_in_words(tmp_path_factory, kind: str, data: st.DataObject) -> None:
    damaged = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind.lower()}"
    path.write_bytes(bytes(damaged))
    try:
        image = load_image(path, "segments[3]")
    except InputError as error:
        assert error.where == "segments[3]"  # noqa: PT017 - damage is allowed to leave an image that can be read
        return
    assert image.mode == "RGB"
    assert struct.calcsize("BBB") * image.width * image.height == len(image.tobytes())
