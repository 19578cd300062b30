"""Bounds from the configuration against figures worked out by hand."""

from __future__ import annotations

import pytest
import torch

from mm_interleaved import MMInterleaved, MMInterleavedConfig
from mm_interleaved.model import roofline
from mm_interleaved.model.cost import Cost, measure


@pytest.fixture(scope="module")
def release() -> MMInterleaved:
    with torch.device("meta"):
        return MMInterleaved(MMInterleavedConfig.preset("release")).to(torch.bfloat16)


@pytest.fixture(scope="module")
def cost(release: MMInterleaved) -> Cost:
    return measure(release.config)


def test_a_token_of_the_release_is_bound_by_its_weights(release: MMInterleaved, cost: Cost) -> None:
    need = roofline.decoding(release, cost, columns=600, images=5)
    layers = 40 * 317_204_480 * 2  # parameters of a Vicuna-13B layer
    head, mmfs = 32002 * 5120 * 2, 10 * 5120 * (640 + 1024) * 2
    keys = 600 * 2 * 40 * 5120 * 2
    samples = 10 * 5 * 3 * 8 * 1024 * 4 * 2
    assert need.bytes == pytest.approx(layers + head + mmfs + keys + samples, rel=1e-3)
    assert need.seconds(4.28e12, 780e12) == pytest.approx(need.bytes / 4.28e12)
    assert 1e3 * need.seconds(4.28e12, 780e12) == pytest.approx(6.2, abs=0.2)  # as the goals have it
    beams = roofline.decoding(release, cost, columns=600, images=5, rows=5)
    assert beams.operations == 5 * need.operations
    assert beams.bytes < 1.01 * need.bytes


def test_images_and_prefills_are_bound_by_arithmetic(release: MMInterleaved, cost: Cost) -> None:
    image = roofline.image(release, cost)
    assert image.seconds(4.28e12, 780e12) == pytest.approx(2 * cost.draw_image / 780e12)
    prefill = roofline.prefill(release, cost, 2048, 15)
    assert 60 < 1e3 * prefill.seconds(4.28e12, 780e12) < 90  # the goals say 75 ms


def test_needs_add_up() -> None:
    need = roofline.Need(10, 4) + roofline.Need(1, 1) * 2
    assert (need.operations, need.bytes) == (12, 6)
    assert need.seconds(1, 100) == 6
