"""Rows of several samples: each sample has the results that it has in a row of its own."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from mm_interleaved import Batch, Document, Image, MMInterleaved, MMInterleavedConfig, MMInterleavedProcessor, Text
from mm_interleaved.model.config import _debug
from mm_interleaved.model.image_decoder import NoiseSamples
from mm_interleaved.training.checkpointing import enable_checkpointing

from ..conftest import awaken, make_image
from .test_model import tree

SLOW = pytest.mark.slow
LENGTH = 44  # of a row: two samples in the first, three in the second


def image(number: int, supervise: bool = True) -> Image:
    return Image(make_image(number), supervise=supervise)


SAMPLES = [
    Document([Text("a red house"), image(1), Text("the same at night"), image(2), Text("and by day"), image(3)]),
    Document([image(4, supervise=False), Text("what is it?", supervise=False), Text("a boat")]),
    Document([Text("no image here")]),
    Document([image(5, supervise=False), image(6), Text("two of them")]),
    Document([Text("a boat"), image(7)]),
]


def noise_of(noise: NoiseSamples, first: int, count: int) -> NoiseSamples:
    return NoiseSamples(**{f.name: getattr(noise, f.name)[first : first + count] for f in fields(noise)})


def prepared(processor: MMInterleavedProcessor, samples: list[Document], **options: Any) -> tuple[Batch, list[Batch]]:
    """All samples in one batch of packed rows, and each alone."""
    together = processor(samples, training=True, packing="samples", max_length=LENGTH, **options)
    return together, [processor(sample, training=True) for sample in samples]


def losses(model: MMInterleaved, batches: list[Batch], noise: NoiseSamples) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Text and image loss of all batches, each batch by its share of all tokens and images; and the gradients."""
    tokens = sum(int((batch.labels[:, 1:] != -100).sum()) for batch in batches)
    images = sum(len(batch.pixel_values) for batch in batches)
    model.zero_grad()
    text, drawn, done = torch.zeros(()), torch.zeros(()), 0
    for batch in batches:
        own = noise_of(noise, done, len(batch.pixel_values))
        done += len(batch.pixel_values)
        out = model(**batch, noise_samples=own, num_items_in_batch=tokens, num_images_in_batch=images)
        out.loss.backward()
        text = text + out.loss_txt.detach()
        drawn = drawn if out.loss_img is None else drawn + out.loss_img.detach()
    return text, drawn, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def compare(model: MMInterleaved, together: Batch, alone: list[Batch]) -> None:
    noise = model.image_decoder.sample_noise(len(together.pixel_values), torch.Generator().manual_seed(0))
    expected = losses(model, alone, noise)
    found = losses(model, [together], noise)
    for ours, wanted in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2e-6, atol=0)
    assert expected[1] > 0
    assert len(found[2]) == len(expected[2])
    largest = max(float(g.abs().max()) for g in expected[2])
    for ours, wanted in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6 * largest)


def trained(config: dict[str, Any] | None = None) -> MMInterleaved:
    """A model that looks at images, with all weights trainable and two earlier images in the UNet."""
    torch.manual_seed(0)
    settings = MMInterleavedConfig(**(config or _debug()))
    settings.frozen = [r"image_decoder\.vae\."]
    settings.image_decoder.previous_images = 2
    model = MMInterleaved(settings)
    awaken(model)
    return model.train()


def test_packed_losses_are_the_sum_of_the_single_ones(processor: MMInterleavedProcessor) -> None:
    together, alone = prepared(processor, SAMPLES)
    assert together.sample_ids.max(1).values.tolist() == [1, 2]
    assert len(together.input_ids) == 2
    compare(trained(), together, alone)


@pytest.mark.parametrize(
    "kind", ["checkpointed", "no MMFS", *(pytest.param(k, marks=SLOW) for k in ("reference", "window"))]
)
def test_packed_losses_by_every_path(processor: MMInterleavedProcessor, kind: str) -> None:
    config = tree("mistral") if kind == "window" else _debug()
    if kind == "window":
        config["text_config"]["sliding_window"] = 9
    if kind == "no MMFS":
        config["mmfs"]["enabled"] = config["image_decoder"]["mmfs"]["enabled"] = False
    model = trained(config)
    model.config.isolate_documents = kind == "window"
    model.set_mmfs_implementation("reference" if kind == "reference" else "fast")
    if kind == "checkpointed":
        enable_checkpointing(model, selective=True)
    side = "left" if kind == "window" else "right"
    compare(model, *prepared(processor, SAMPLES[1:4], padding_side=side))


def test_samples_of_several_documents(processor: MMInterleavedProcessor) -> None:
    """A template may print `<s>` inside a conversation; attention does not end there."""
    again = Text("</s><s>", attached=True, control_tokens=True)
    samples = [Document([image(1), Text("a boat"), again, image(2), Text("b")]), SAMPLES[3]]
    compare(trained(), *prepared(processor, samples))


@torch.no_grad()
def test_a_sample_changes_no_other(processor: MMInterleavedProcessor) -> None:
    """Neither logits nor conditioning tokens nor the UNet's earlier images of the second sample know of the first."""
    model = trained().eval()
    first = SAMPLES[0]
    other = Document([Text("a red house"), image(8), Text("and by day"), image(9), Text("the same at night"), image(1)])
    batches = [processor([s, SAMPLES[3]], training=True, packing="samples", max_length=LENGTH) for s in (first, other)]
    assert batches[0].input_ids.shape == batches[1].input_ids.shape
    assert len(batches[0].input_ids) == 1
    noise = model.image_decoder.sample_noise(5, torch.Generator().manual_seed(0))
    own = batches[0].sample_ids[0] == 1
    mask = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
    outputs = [
        model(**{**b, "image_loss_mask": mask}, noise_samples=noise, return_logits=True, return_conditions=True)
        for b in batches
    ]
    assert not torch.equal(outputs[0].logits[0, ~own], outputs[1].logits[0, ~own])
    assert torch.equal(outputs[0].logits[0, own], outputs[1].logits[0, own])
    assert torch.equal(outputs[0].conditions[3:], outputs[1].conditions[3:])
    torch.testing.assert_close(
        outputs[0].loss_img, outputs[1].loss_img, rtol=1e-6, atol=0
    )  # the batch's kernels differ


@torch.no_grad()
def test_without_the_boundary_the_second_sample_changes(processor: MMInterleavedProcessor) -> None:
    model = trained().eval()
    batch, _ = prepared(processor, SAMPLES[3:])
    apart = model(**batch, return_logits=True).logits
    row = {name: value for name, value in batch.items() if name not in ("sample_ids", "position_ids")}
    joined = model(**row, return_logits=True).logits
    second = batch.sample_ids == 1
    assert torch.equal(apart[batch.sample_ids == 0], joined[batch.sample_ids == 0])
    assert not torch.allclose(apart[second], joined[second], atol=1e-3)


@torch.no_grad()
def test_positions_and_starts_follow_from_the_samples(processor: MMInterleavedProcessor) -> None:
    model = trained().eval()
    batch, _ = prepared(processor, SAMPLES[3:])
    noise = model.image_decoder.sample_noise(3, torch.Generator().manual_seed(0))
    given = model(**batch, noise_samples=noise)
    derived = {n: v for n, v in batch.items() if n not in ("position_ids", "document_starts")}
    found = model(**derived, noise_samples=noise)
    assert found.loss_txt == given.loss_txt
    assert found.loss_img == given.loss_img


@torch.no_grad()
def test_what_cannot_keep_samples_apart_is_refused(processor: MMInterleavedProcessor) -> None:
    model = trained()
    batch, _ = prepared(processor, SAMPLES[3:])
    with pytest.raises(ValueError, match="sample_ids cannot be used with a cache"):
        model(**batch, use_cache=True)
    with pytest.raises(ValueError, match=r"sample_ids is \[1, 3\], but input_ids is"):
        model(**{**batch, "sample_ids": torch.zeros(1, 3)})
    flash = copy.deepcopy(model)
    flash.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="take 'sdpa', or rows of one sample"):
        flash(**batch)
    config = tree("qwen2")
    config["text_config"] |= {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5}
    with pytest.raises(ValueError, match=r"others to all.*rows of one sample"):
        trained(config)(**batch)
