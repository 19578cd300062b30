"""Captured graphs, stood in for on a CPU: with an adapter as with merged weights, and when it is switched off."""

from __future__ import annotations

from pathlib import Path

from mm_interleaved.adapters.loading import merge_adapters
from mm_interleaved.pretrained import load

from ..generation.test_image_weights import outputs as image_outputs
from ..generation.test_image_weights import same as same_images
from ..generation.test_text_weights import made, outputs, same
from .make_adapter import make

__all__ = ["made"]


def test_a_captured_decode_step(base: Path, tmp_path: Path, made: list) -> None:
    make(base, tmp_path / "adapter")
    bare = outputs(load(base).model, "static", texts=False)
    model = load(base, adapters=[tmp_path / "adapter"]).model
    found = outputs(model, "static", texts=False)
    assert made
    assert not same(found, bare)
    model.disable_adapters()
    assert same(outputs(model, "static", texts=False), bare)
    model.enable_adapters()
    merge_adapters(model)
    assert same(outputs(model, "static", texts=False), found)


def test_a_captured_denoising_step(base: Path, tmp_path: Path) -> None:
    make(base, tmp_path / "adapter")
    model = load(base, adapters=[tmp_path / "adapter"]).model
    found = image_outputs(model, "static", 2)
    assert not same_images(found, image_outputs(load(base).model, "static", 2), 1e-3)
    assert same_images(found, image_outputs(model, "dynamic", 2))
    merge_adapters(model)
    assert same_images(found, image_outputs(model, "static", 2))
