"""Conditioning tokens that are held to what they were."""

from __future__ import annotations

import copy

import pytest
import torch

from mm_interleaved import Batch, Document, Image, MMInterleaved, MMInterleavedProcessor, Text
from mm_interleaved.training.distillation import ConditionDistillation, DistilledOutput

from ..conftest import make_image


@pytest.fixture
def batch(processor: MMInterleavedProcessor) -> Batch:
    pages = [
        Document([Text("a red house"), Image(make_image(1)), Text("and the same at night"), Image(make_image(2))]),
        Document([Text("no image here")]),
    ]
    return processor(pages, training=True)


def run(model: MMInterleaved, distillation: ConditionDistillation, batch: Batch, **weights: float) -> DistilledOutput:
    noise = model.image_decoder.sample_noise(len(batch.pixel_values), torch.Generator().manual_seed(0))
    return distillation.add_to(model(**batch, noise_samples=noise, return_conditions=True, **weights), batch)


def test_conditions_can_be_held_to_what_they_were(model: MMInterleaved, batch: Batch) -> None:
    own = copy.deepcopy(model)
    distillation = ConditionDistillation(own, 3.0)
    out = run(own, distillation, batch)
    assert out.loss_distillation.item() < 1e-10  # nothing has moved yet
    torch.testing.assert_close(out.loss, out.loss_txt + 10 * out.loss_img)

    with torch.no_grad():
        for p in own.image_decoder.resampler.parameters():
            p.add_(0.3)
    out = run(own, distillation, batch, loss_text_weight=1.0, loss_image_weight=0.0)
    assert out.loss_distillation.item() > 1e-4
    torch.testing.assert_close(out.loss, out.loss_txt + out.loss_distillation)
    own.zero_grad()
    out.loss_distillation.backward()
    assert own.language_model.layers[0].mlp.down_proj.weight.grad.abs().max() > 0
    assert own.lm_head.head.weight.grad is None  # no text loss in it
    assert set(own.state_dict()) == set(model.state_dict())  # what it was is no part of it
    teacher = distillation.teacher
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_a_batch_without_target_images_has_no_such_loss(
    model: MMInterleaved, processor: MMInterleavedProcessor
) -> None:
    batch = processor(Document([Text("no image at all")]), training=True)
    out = run(model, ConditionDistillation(model, 3.0), batch)
    assert out.loss_distillation is None
    assert out.loss == out.loss_txt
