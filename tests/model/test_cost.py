"""Counted costs against figures that were computed by hand."""

from __future__ import annotations

import pytest

from mm_interleaved import MMInterleavedConfig
from mm_interleaved.model.cost import measure


@pytest.mark.slow
def test_release_costs() -> None:
    cost = measure(MMInterleavedConfig.preset("release"), images=5)
    head, output_proj, folded = 32002 * 5120 + 2 * 5120, 10 * 1024 * 5120, 10 * 5120 * 640
    assert cost.token == pytest.approx(12.69e9 + head + output_proj, rel=1e-3)
    heads, levels, points, dim, macs = 16, 3, 8, 64, 5  # a sample weighs four neighbours, and is weighed
    samples = 10 * heads * levels * points * dim * macs
    assert cost.token_with_images - cost.token == folded + 5 * samples  # W1, W2: images add only their samples
    assert cost.cache_per_image * 2 == pytest.approx(26.25 * 2**20, rel=1e-3)
    assert cost.draw_step == pytest.approx(2 * (402e9 + 19.6e9), rel=0.03)
    assert cost.parts[0].trainable == 1_465_276_208


@pytest.mark.slow
def test_cost_of_small_grows_with_steps() -> None:
    one, two = (measure(MMInterleavedConfig.preset("debug"), steps=s) for s in (10, 20))
    assert two.draw_image - one.draw_image == 10 * one.draw_step
