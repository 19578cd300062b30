"""A batch planned beforehand gives what the model finds out by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_interleaved import MMInterleaved, MMInterleavedConfig, MMInterleavedProcessor
from mm_interleaved.document import Document, Image, Text
from mm_interleaved.model.layout import find_images, token_routes, visible_images
from mm_interleaved.model.mmfs import VisibleImages

from ..conftest import make_image

BOS, SOI = 1, 2


@settings(max_examples=60)
@given(st.lists(st.lists(st.sampled_from([BOS, SOI, 5, 6]), min_size=9, max_size=9), min_size=1, max_size=3), st.data())
def test_routes_without_sorting_are_the_sorted_ones(rows, data) -> None:
    ids = torch.tensor(rows)
    lengths = torch.tensor([data.draw(st.integers(1, 9)) for _ in rows])
    left = data.draw(st.booleans())
    place = torch.arange(9)
    mask = ((place >= 9 - lengths[:, None]) if left else (place < lengths[:, None])).long()
    ids = torch.where(mask == 1, ids, 7)
    positions = find_images(ids, mask, SOI, None)
    images = visible_images(ids, mask, BOS, SOI)
    sorted_routes = VisibleImages.build(images.flatten(0, 1), len(positions.rows)).routes
    routes = token_routes(ids, mask, images, positions, BOS)
    for found, wanted in zip(routes.tolist(), sorted_routes.tolist(), strict=True):
        assert [x for x in found if x >= 0] == [x for x in wanted if x >= 0]


@pytest.fixture
def batch(processor: MMInterleavedProcessor):
    pages = [
        Document([Text("One."), Image(make_image(0)), Text("Two."), Image(make_image(1)), Text("Three.")]),
        Document([Image(make_image(2)), Text("Alone.")]),
    ]
    return processor(pages, training=True)


def test_a_planned_batch_has_the_same_losses(model: MMInterleaved, batch) -> None:
    draws = model.image_decoder.sample_noise(3, torch.Generator().manual_seed(1))
    layout = model.plan(batch.input_ids, batch.attention_mask, batch.document_starts, batch.labels)
    with torch.no_grad():
        plain = model(**batch, noise_samples=draws)
        planned = model(**batch, noise_samples=draws, layout=layout)
        masked = model(**batch, noise_samples=draws, layout=layout.__class__(**{**vars(layout), "padded": True}))
    assert planned.loss == plain.loss
    assert masked.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)


def test_some_images_several_times_is_the_mean_over_the_draws(model: MMInterleaved, batch) -> None:
    """With two draws of images 0 and 2, the loss is the mean of the losses with each."""
    targets, losses = torch.tensor([0, 2]), []
    single = [model.image_decoder.sample_noise(2, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    both = single[0].__class__(**{k: torch.cat([getattr(d, k) for d in single]) for k in vars(single[0])})
    arguments = (batch.input_ids, batch.attention_mask, batch.document_starts, batch.labels, targets)
    with torch.no_grad():
        for draws in single:
            losses.append(model(**batch, noise_samples=draws, layout=model.plan(*arguments)).loss_img)
        together = model(**batch, noise_samples=both, layout=model.plan(*arguments, repeats=2)).loss_img
    assert together.item() == pytest.approx((losses[0] + losses[1]).item() / 2, rel=1e-5)


@pytest.mark.parametrize("part", ["mmfs", "image_decoder"])
def test_a_model_without_synchronizers_reads_and_draws(part: str, batch, processor: MMInterleavedProcessor) -> None:
    tree = MMInterleavedConfig.preset("debug").to_dict()
    (tree if part == "mmfs" else tree["image_decoder"])["mmfs"]["enabled"] = False
    model = MMInterleaved(MMInterleavedConfig(**tree)).eval()
    names = [n for n, _ in model.named_parameters() if "synchronizer" in n]
    prefix = "language_model." if part == "mmfs" else "image_decoder."
    assert names
    assert not any(n.startswith(prefix) for n in names)
    model(**batch).loss.backward()
    page = Document([Text("One."), Image(make_image(0)), Text("Two."), Image(), Text()])
    *_, last = model.generate_interleaved(page, processor, num_inference_steps=2, max_new_tokens=4, num_beams=1)
    assert len(last.result.images) == 2
