"""Mean IoU: by hand, against a confusion matrix of torchmetrics, and with a tiny segmenter from a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_confusion_matrix
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from mm_interleaved.metrics.segmentation import CLASSES, MeanIoU, SegmentedMeanIoU, Segmenter, areas
from tests.conftest import make_image


def test_areas_by_hand() -> None:
    label = np.array([[1, 1, 2], [0, 2, 2]])
    predicted = np.array([[1, 2, 2], [1, 2, 3]])  # the 1 over the unlabelled pixel does not count
    assert areas(predicted, label, 3).tolist() == [[1, 2, 0], [1, 3, 1], [2, 3, 0]]


def test_both_means_by_hand() -> None:
    label, predicted = np.array([[1, 1, 2], [0, 2, 2]]), np.array([[1, 2, 2], [1, 2, 3]])
    result = MeanIoU()({"a": predicted}, {"a": label})
    assert result.values["miou_present"] == pytest.approx(100 * (1 / 2 + 2 / 4) / 2)
    assert result.values["miou"] == pytest.approx(100 * (1 / 2 + 2 / 4) / CLASSES)
    assert result.per_sample == {"miou_per_image": {"a": pytest.approx(50)}}


def test_areas_add_up_over_the_set_before_they_are_divided() -> None:
    labels = {1: np.array([[1, 1, 1, 1]]), 2: np.array([[1]])}
    predictions = {1: np.array([[1, 1, 1, 1]]), 2: np.array([[2]])}
    result = MeanIoU()(predictions, labels)
    assert result.values["miou_present"] == pytest.approx(80)
    assert result.per_sample["miou_per_image"] == pytest.approx({1: 100, 2: 0})
    assert result.values["miou_per_image"] == pytest.approx(50)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(2, 20))
def test_it_agrees_with_a_confusion_matrix(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes + 1, (12, 9))
    predicted = np.where(rng.random(label.shape) < 0.6, label, rng.integers(1, classes + 1, label.shape)).clip(1)
    keep = label > 0
    matrix = multiclass_confusion_matrix(
        torch.from_numpy(predicted[keep] - 1), torch.from_numpy(label[keep] - 1), classes
    ).numpy()
    shared, union = np.diag(matrix), matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    expected = 100 * np.mean(shared / np.maximum(union, 1))
    result = MeanIoU(classes)({0: predicted}, {0: label})
    assert result.values["miou"] == pytest.approx(expected)
    order = rng.permutation(label.size)
    mixed = MeanIoU(classes)({0: predicted.ravel()[order]}, {0: label.ravel()[order]})
    assert mixed.values == pytest.approx(result.values)
    assert MeanIoU(classes)({0: label}, {0: label}).values["miou_present"] == pytest.approx(100 * bool(keep.any()))


@pytest.mark.parametrize(
    ("predicted", "label", "words"),
    [
        (np.ones((2, 2), int), np.ones((2, 3), int), "resize it"),
        (np.full((2, 2), 151), np.ones((2, 2), int), "predicted map: classes must be 0 to 150, got 151"),
        (np.ones((2, 2), int), np.full((2, 2), 255), "label map: classes must be 0 to 150, got 255"),
    ],
)
def test_bad_maps_are_named(predicted: np.ndarray, label: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        MeanIoU()({"room": predicted}, {"room": label})
    assert "'room'" in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmenter")
    config = SegformerConfig(
        num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8], num_attention_heads=[1], mlp_ratios=[1],
        patch_sizes=[3], strides=[2], decoder_hidden_size=8, num_labels=CLASSES,
    )  # fmt: skip
    torch.manual_seed(0)
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


class TestSegmenter:
    def test_maps_have_the_size_asked_for_and_score_fully_against_themselves(self, folder: Path) -> None:
        segmenter = Segmenter(folder)
        drawn = make_image(0)
        found = segmenter(drawn, (40, 30))
        assert found.shape == (30, 40)
        assert 1 <= found.min() <= found.max() <= CLASSES
        result = SegmentedMeanIoU(segmenter)({"a": drawn}, {"a": found})
        assert result.values["miou_present"] == pytest.approx(100)
        other = SegmentedMeanIoU(segmenter)({"a": PIL.Image.new("RGB", (40, 30))}, {"a": found})
        assert other.values["miou_present"] < 100

    @pytest.mark.parametrize("name", [None, "nowhere"])
    def test_no_model_is_said(self, name: str | None, tmp_path: Path) -> None:
        metric = SegmentedMeanIoU(Segmenter(tmp_path / name if name else None))
        result = metric({"a": make_image()}, {"a": np.ones((4, 4), int)})
        assert result.skipped.startswith("no segmentation model")
        assert "oneformer" in result.fix
