"""A batch is a dictionary of tensors for every library that handles one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate.utils import concatenate, find_batch_size, send_to_device
from torch.utils.data import DataLoader
from transformers import BatchFeature

from mm_interleaved import Batch, Document, Image, MMInterleaved, MMInterleavedProcessor, Text

from ..conftest import make_image

FLOATS = {"pixel_values", "target_pixel_values", "image_loss_mask"}


@pytest.fixture
def batch(processor: MMInterleavedProcessor) -> Batch:
    return processor([Document([Text("a"), Image(make_image())]), Document([Text("b c d")])], training=True)


def same(a: Batch, b: Batch) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_made_from_its_items(batch: Batch) -> None:
    assert isinstance(batch, BatchFeature)
    for again in (Batch(**batch), Batch({**batch}), Batch(dict(batch)), copy.copy(batch), copy.deepcopy(batch)):
        assert same(again, batch)
        assert again.labels is again["labels"]
        assert again.data is not batch.data


def test_only_keys_that_are_there(processor: MMInterleavedProcessor) -> None:
    batch = processor(Document([Text("a")]))
    assert "labels" not in batch
    assert batch.get("labels") is None
    with pytest.raises(AttributeError):
        _ = batch.labels
    with pytest.raises(AttributeError, match=r"batch\['labels'\] = \.\.\."):
        batch.labels = batch.input_ids
    batch["labels"] = batch.input_ids
    assert batch.labels is batch.input_ids


def test_only_floats_are_cast(batch: Batch) -> None:
    before = {name: value.dtype for name, value in batch.items()}
    assert batch.to("cpu", torch.bfloat16) is batch
    assert {n: v.dtype for n, v in batch.items()} == {
        n: torch.bfloat16 if n in FLOATS else t for n, t in before.items()
    }
    batch["pixel_values"] = (batch.pixel_values.float() * 255).to(torch.uint8)
    assert batch.to(torch.float32).pixel_values.dtype == torch.uint8


def test_the_source_travels_along(batch: Batch) -> None:
    batch.source = "pages"
    batch["loss_text_weight"] = 0.5
    for again in (pickle.loads(pickle.dumps(batch)), copy.copy(batch)):
        assert again.source == "pages"
        assert again["loss_text_weight"] == 0.5
    assert "source" not in batch


def test_other_libraries_handle_it(batch: Batch) -> None:
    """accelerate, and the conversion of a data loader without a collator."""
    assert find_batch_size(batch) == 2
    sent = send_to_device(Batch(**batch), torch.device("cpu"), non_blocking=True)
    assert isinstance(sent, Batch)
    assert same(sent, batch)
    twice = concatenate([batch, batch])
    assert isinstance(twice, Batch)
    assert twice.input_ids.shape == (4, batch.input_ids.shape[1])
    (loaded,) = DataLoader([batch], batch_size=None)
    assert isinstance(loaded, Batch)
    assert same(loaded, batch)


@pytest.mark.gpu
def test_page_locked_memory(batch: Batch) -> None:
    batch.source, batch["loss_text_weight"] = "pages", 0.5
    pinned = batch.pin_memory()
    assert all(v.is_pinned() for v in pinned.values() if isinstance(v, torch.Tensor))
    assert (pinned.source, pinned["loss_text_weight"]) == ("pages", 0.5)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_the_model_takes_all_of_it(model: MMInterleaved, processor: MMInterleavedProcessor, training: bool) -> None:
    batch = processor(Document([Text("a"), Image(make_image())]), training=training)
    out = model(**batch)
    assert (out.loss is None, out.logits is None) == (not training, training)
    with pytest.raises(TypeError, match="unexpected keyword argument 'pixels'"):
        model(**batch, pixels=batch.pixel_values)
