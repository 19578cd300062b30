"""Augmentation keeps truth: boxes cover their objects in what is fed, and label maps stay with their photos."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as for_all
from hypothesis import strategies as st

from mm_interleaved import MMInterleaved, MMInterleavedProcessor, MMInterleavedTokenizer
from mm_interleaved.configuration import ConfigError, make_config
from mm_interleaved.data import DataConfig, DataError, SourceConfig, build_loader
from mm_interleaved.data.augmentation import AugmentConfig, CropConfig, apply, augment, swap_sides
from mm_interleaved.document import Box, Document, Image, Text, Transform
from mm_interleaved.evaluation.config import TaskSuite
from mm_interleaved.evaluation.predict import Predictor
from mm_interleaved.io import InputError
from mm_interleaved.io.images import load_image, upright_size
from mm_interleaved.metrics.grounding import SCALE, iou, parse_box
from mm_interleaved.processor import Batch
from mm_interleaved.processor.packing import TokenStream
from mm_interleaved.tasks import TASKS, Item, Source, TaskConfig, TaskType, given, make_task

from .test_resume import same, through_file

RED, BLUE = (255, 0, 0), (0, 0, 255)
TURNS = {
    1: None,
    3: PIL.Image.Transpose.ROTATE_180,
    6: PIL.Image.Transpose.ROTATE_90,
    8: PIL.Image.Transpose.ROTATE_270,
}
"""By the value of EXIF's orientation, how an upright image is turned before it is stored."""
EVERYTHING = AugmentConfig(flip=0.5, crop=CropConfig(scale=[0.2, 1.0], prob=0.8))


@pytest.fixture(scope="module")
def views(tokenizer: MMInterleavedTokenizer) -> MMInterleavedProcessor:
    """A processor with images that are large enough for a box to be measured."""
    return MMInterleavedProcessor(tokenizer, num_image_tokens=4, image_size=224, target_size=160)


def save(path: Path, image: PIL.Image.Image, orientation: int = 1) -> Path:
    """Store an upright image as cameras do: turned, with a note of the turn."""
    turn = TURNS[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    (image if turn is None else image.transpose(turn)).save(path, exif=exif)
    return path


def extent(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """The box around what is rather red than blue in [S, S, 3], in 1/999 of the sides."""
    rows, columns = np.nonzero(pixels[..., 0] > pixels[..., 2])
    side = len(pixels)
    ends = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    x1, y1, x2, y2 = (float(end) * SCALE / side for end in ends)
    return x1, y1, x2, y2


def texts_of(document: Document) -> list[str | None]:
    return [segment.text for segment in document.segments if isinstance(segment, Text)]


def draw(size: tuple[int, int], sides: tuple[int, int, int, int]) -> PIL.Image.Image:
    """A red rectangle on blue."""
    image = PIL.Image.new("RGB", size, BLUE)
    image.paste(RED, sides)
    return image


@st.composite
def scenes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """The size of an image, and an object that takes at least a sixth of each side."""
    size = draw(st.integers(48, 300)), draw(st.integers(48, 300))
    ends: list[int] = []
    for side in size:
        length = draw(st.integers(-(-side // 6), side))
        start = draw(st.integers(0, side - length))
        ends += [start, start + length]
    return size, (ends[0], ends[2], ends[1], ends[3])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@for_all(scenes(), st.sampled_from([*TURNS]), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_box_covers_its_object_in_the_tensors_that_are_fed(
    views: MMInterleavedProcessor, tmp_path: Path, scene: Any, orientation: int, normalised: bool, seed: int
) -> None:
    (width, height), sides = scene
    path = save(tmp_path / "a.png", draw((width, height), sides), orientation)
    assert upright_size(path) == (width, height)
    shares = Box(sides[0] / width, sides[1] / height, sides[2] / width, sides[3] / height)
    box = shares if normalised else Box.from_pixels(sides, upright_size(path))
    document = Document([Image(path), Text.of("the red one on the left<box>", box, "</box>")])
    changed = augment(document, EVERYTHING, np.random.default_rng(seed))

    batch = views(changed, training=True)
    stated = parse_box(views.decode_text(batch.input_ids[0].tolist()))
    for pixels in (batch.pixel_values, batch.target_pixel_values):
        found = extent(pixels[0].permute(1, 2, 0).numpy())
        assert iou(stated, found) >= 0.9, (stated, found)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@for_all(scenes(), st.sampled_from(["center", "squash", None]), st.sampled_from([*TURNS]), st.integers(0, 2**32 - 1))
def test_label_map_photo_and_target_stay_aligned(
    views: MMInterleavedProcessor, tmp_path: Path, scene: Any, square: Any, orientation: int, seed: int
) -> None:
    size, sides = scene
    label_map = draw(size, sides)
    photo = label_map.resize((2 * size[0], 2 * size[1]), PIL.Image.Resampling.NEAREST)
    paths = [save(tmp_path / "map.png", label_map), save(tmp_path / "photo.png", photo, orientation)]
    document = Document([Image(paths[0], supervise=False, target=paths[1]), Text("Sky."), Image(paths[1])])
    changed = augment(document, replace(EVERYTHING, square=square), np.random.default_rng(seed))
    batch = views(changed, training=True)
    small = torch.nn.functional.interpolate(batch.pixel_values, batch.target_pixel_values.shape[-1], mode="area")
    seen = [*(x > 0.5 for x in small[:, 0]), *(x > 0.5 for x in batch.target_pixel_values[:, 0])]
    for other in seen[1:]:
        assert (other != seen[0]).float().mean() < 0.04  # the borders of the object


def test_crops_keep_the_boxes_of_all_texts_whole_and_differ() -> None:
    boxes = [Box(0.5, 0.4, 0.6, 0.45), Box(0.7, 0.2, 0.8, 0.5)]
    document = Document([Image("a.png"), *(Text.of("one", box) for box in boxes)])
    config, rng = AugmentConfig(crop=CropConfig(scale=[0.1, 0.4])), np.random.default_rng(0)
    regions = set()
    for _ in range(50):
        changed = augment(document, config, rng)
        transform = changed.images[0].transform
        assert transform is not None
        x1, y1, x2, y2 = transform.region
        assert min(0.5 - x1, 0.2 - y1, x2 - 0.8, y2 - 0.5) >= 0
        assert (x2 - x1) * (y2 - y1) < 0.45
        regions.add(transform.region)
    assert len(regions) == 50


@for_all(
    st.lists(
        st.sampled_from(["Left", "right", "LEFTMOST", "bright", "a", "rightward", "copyright", "(left)"]), max_size=6
    ),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_two_flips_give_the_same_text(words: list[str], sides: list[float]) -> None:
    xs, ys = sorted(sides[:2]), sorted(sides[2:])
    box = Box(xs[0], ys[0], xs[1], ys[1])
    document = Document(
        [Image("a.png"), Text.of(" ".join(words), box, " left of it"), Text("and right", attached=True)]
    )
    once = apply(document, Transform(flip=True))
    twice = apply(once, Transform(flip=True))
    assert texts_of(once) != texts_of(document)
    assert texts_of(twice) == texts_of(document)
    assert twice.images[0].transform == Transform()
    with pytest.raises(InputError, match="cut or flipped"):
        once.to_dict()


def test_left_and_right_are_swapped_as_words_only() -> None:
    text = "Left of the RIGHT one, a bright lefty copyright; left-hand, rightmost and Leftmost. Rights, left_1 aright"
    swapped = (
        "Right of the LEFT one, a bright lefty copyright; right-hand, leftmost and Rightmost. Rights, right_1 aright"
    )
    assert swap_sides(Text(text)).text == swapped
    assert swap_sides(Text()).text is None


def test_only_settings_change_a_document(views: MMInterleavedProcessor) -> None:
    document = Document([Image(draw((60, 40), (10, 10, 20, 20))), Text("left")])
    assert augment(document, AugmentConfig(), np.random.default_rng(0)) is document
    squashed = augment(document, AugmentConfig(), np.random.default_rng(0), square="squash")
    assert squashed.images[0].transform == Transform(square="squash")
    centred = augment(document, AugmentConfig(square="center"), np.random.default_rng(0), square="squash")
    assert np.array_equal(views.views(centred.images[0], True).input, views.views(document.images[0], True).input)


def test_an_image_with_a_box_is_stretched_by_itself_and_never_cropped(views: MMInterleavedProcessor) -> None:
    image = draw((300, 100), (0, 0, 100, 100))
    box = Box(0.0, 0.0, 1 / 3, 1.0, image=1)
    document = Document([Image(image), Image(image), Text.of("red", box)])
    first, second = views(document).pixel_values
    assert first[0].mean() < 0.05  # its left third is cut off
    assert second[0].mean() == pytest.approx(1 / 3, abs=0.01)
    centred = augment(document, AugmentConfig(square="center"), np.random.default_rng(0))
    with pytest.raises(InputError, match="the image of a box would be cropped"):
        views(centred)
    with pytest.raises(InputError, match="a box is in image 1, but there are 1 images"):
        views(Document([Image(image), Text.of("red", box)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, "flip must be"),
        ({"square": "pad"}, "square must be"),
        ({"crop": {"scale": [0.9, 0.5]}}, "the smaller one first"),
        ({"crop": {"scale": [0.0, 0.5]}}, "two shares of the area"),
        ({"mirror": 0.5}, "unknown key 'mirror'"),
    ],
)
def test_settings_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(options, AugmentConfig)


# ---- from files to batches


def read_found(source: Source) -> Iterator[Item]:
    """Where the red rectangle is in `0.png` to `5.png`."""
    for number in range(6):
        path, problem = source.images.find(f"{number}.png")
        found = extent(np.asarray(load_image(path).resize((999, 999), PIL.Image.Resampling.NEAREST)))
        box = Box.from_pixels(found, (SCALE, SCALE))
        yield Item(str(number), {"image": given(path)}, None, [Text.of(box)], problem=problem, place=f"found, {number}")


FOUND = TaskType("found", "where the red rectangle is", read_found, "text", "{image}Left or right?<box>", (),
                 phases=("train",), crop="squash")  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(TASKS._values, "found", FOUND)
    for number in range(6):
        save(
            tmp_path / f"{number}.png",
            draw((120, 60), (10 + 15 * number, 10, 40 + 15 * number, 40)),
            (1, 6)[number % 2],
        )
    return tmp_path


def batches(processor: MMInterleavedProcessor, root: Path, length: int = 400, square: Any = None) -> Any:
    source = SourceConfig("task", root=str(root), batch_size=1, max_length=length, keep_remainder=True, shuffle=0,
                          augment=replace(EVERYTHING, square=square),
                          options={"task": "found", "images": "."})  # fmt: skip
    return build_loader(DataConfig([source], pin_memory=False, sampling="sum"), processor)


def test_batches_of_every_epoch_have_boxes_on_their_objects(views: MMInterleavedProcessor, root: Path) -> None:
    loader = batches(views, root)
    texts = []
    for _ in range(2):
        for batch in loader:
            text = views.decode_text(batch.input_ids[0].tolist())
            stated = [parse_box(found) for found in re.findall(r"\(\d+,\d+\)\(\d+,\d+\)", text)]
            assert len(stated) == len(batch.pixel_values)
            for box, pixels, target in zip(stated, batch.pixel_values, batch.target_pixel_values, strict=True):
                assert iou(box, extent(pixels.permute(1, 2, 0).numpy())) >= 0.9
                assert iou(box, extent(target.permute(1, 2, 0).numpy())) >= 0.9
            texts.append(text)
    assert len(texts) == len({*texts}) == 2
    assert any("Right or left" in text for text in texts)


def test_draws_are_the_same_after_resuming(views: MMInterleavedProcessor, root: Path) -> None:
    loader = batches(views, root, 60)
    whole: list[Batch] = list(loader)
    first = batches(views, root, 60)
    list(itertools.islice(iter(first), 1))
    second = batches(views, root, 60)
    second.load_state_dict(through_file(first.state_dict()))
    rest = list(second)
    assert len(rest) == len(whole) - 1 > 1
    assert all(same(a, b) for a, b in zip(rest, whole[1:], strict=True))


def test_evaluation_feeds_the_image_that_training_feeds(
    model: MMInterleaved, processor: MMInterleavedProcessor, root: Path
) -> None:
    task = make_task(TaskConfig("found", images=str(root)))
    predictor = Predictor(model, processor, task, TaskSuite(root=str(root), tasks=[task.config]))
    for sample, document in zip(task.samples(), task.documents(), strict=True):
        loaded = predictor.load(sample)
        assert not isinstance(loaded, str)
        (image,) = (image for item in loaded.prepared.plan if isinstance(item, TokenStream) for image in item.images)
        trained = processor.encode(processor.render(document)).images[0]
        assert np.array_equal(np.asarray(image.source), processor.views(trained, training=True).input)


def test_a_source_that_would_crop_boxes_is_refused(views: MMInterleavedProcessor, root: Path) -> None:
    loader = batches(views, root, square="center")
    with pytest.raises(DataError, match="document cannot be encoded"):
        list(loader)
    reasons = loader.report().rejected("task")
    assert reasons == {"document cannot be encoded": 6}
