"""A denoising step over fixed memory against the UNet called step by step; on a CPU without the capture."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor

from mm_interleaved import MMInterleaved
from mm_interleaved.generation import IMAGE_PRESETS
from mm_interleaved.model import denoising
from mm_interleaved.model.image_settings import ImageSettings
from mm_interleaved.model.unet import EarlierImages

from .test_image_decoder import conditions


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list:
    """The `GraphedUNet`s that are made during a test."""
    made = []

    class Watched(denoising.GraphedUNet):
        def __init__(self, *args: object, **kwargs: object) -> None:
            made.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(denoising, "GraphedUNet", Watched)
    denoising._pool.clear()
    return made


def earlier(model: MMInterleaved, images: list[list[int]], seed: int = 2) -> EarlierImages:
    generator = torch.Generator().manual_seed(seed)
    width = model.config.vision_config.hidden_size
    pyramid = [torch.randn(2, width, s, s, generator=generator) for s in model.config.pyramid_sides]
    return EarlierImages.build(pyramid, torch.tensor(images, dtype=torch.long).view(len(images), -1))


def latents(model: MMInterleaved, seen: EarlierImages, kind: str, **options: object) -> Tensor:
    settings = ImageSettings(**{"num_inference_steps": 3, "cache_implementation": kind, **options})
    count = len(seen.visible.images)
    generator = torch.Generator().manual_seed(0)
    given = conditions(model.image_decoder, count) * (1 + seen.features.mean())
    return torch.stack([s.latents for s in model.image_decoder.denoise(given, seen, settings, generator)])


@pytest.mark.parametrize("images", [[[0]], [[1], [-1]], [[]], [[-1]]])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_same_latents(model: MMInterleaved, made: list, images: list, guidance: float, scheduler: str) -> None:
    seen = earlier(model, images)
    found, expected = (
        latents(model, seen, kind, guidance_scale=guidance, scheduler=scheduler) for kind in ("static", "dynamic")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(made) == 1


@pytest.mark.slow
def test_a_compiled_step_is_one_graph(model: MMInterleaved, made: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler is given, without the minutes that it takes to make code of it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    seen = earlier(model, [[0]])
    found, expected = (latents(model, seen, kind, compile=kind == "static") for kind in ("static", "dynamic"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert made[0]._compiled is not None


def test_another_image_of_the_same_shape(model: MMInterleaved, made: list) -> None:
    """The second takes the place of the first; nothing of the first is left."""
    for seed in (2, 3):
        seen = earlier(model, [[0]], seed)
        torch.testing.assert_close(
            latents(model, seen, "static"), latents(model, seen, "dynamic"), rtol=1e-5, atol=1e-5
        )
    assert len(made) == 1
    latents(model, earlier(model, [[]]), "static")
    assert len(made) == 2


def test_weights_that_change_in_place_count(model: MMInterleaved, made: list) -> None:
    mine, seen = copy.deepcopy(model), earlier(model, [[0]])
    latents(mine, seen, "static")
    with torch.no_grad():
        for parameter in mine.image_decoder.unet.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(latents(mine, seen, "static"), latents(mine, seen, "dynamic"), rtol=1e-5, atol=1e-5)
    assert len(made) == 1
    mine.image_decoder.unet.conv_in.weight = torch.nn.Parameter(mine.image_decoder.unet.conv_in.weight + 0)
    latents(mine, seen, "static")
    assert len(made) == 2


@torch.no_grad()
def test_kept_text_is_projected_text(model: MMInterleaved) -> None:
    unet, seen = model.image_decoder.unet, earlier(model, [[0], [1]])
    sample, time, given = torch.randn(2, 4, 8, 8), torch.tensor(7), conditions(model.image_decoder, 2)
    expected = unet(sample, time, given, seen)
    kept = unet.prepare_text(given)
    assert len(kept) == sum(".attn2." in name for name in unet.attn_processors)
    torch.testing.assert_close(unet(sample, time, torch.zeros_like(given), seen, kept), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_channels_last_changes_no_value(model: MMInterleaved) -> None:
    mine, seen = copy.deepcopy(model), earlier(model, [[0]])
    denoising.lay_out(mine.image_decoder.unet, torch.channels_last)
    torch.testing.assert_close(latents(mine, seen, "static"), latents(model, seen, "dynamic"), rtol=1e-4, atol=1e-4)


def test_presets() -> None:
    assert IMAGE_PRESETS["ddpm-30"].settings == ImageSettings()
    assert [name for name, preset in IMAGE_PRESETS.items() if preset.lossless] == ["ddpm-30"]
    with pytest.raises(ValueError, match="must be 'auto', 'static' or 'dynamic', not 'fixed'"):
        ImageSettings(cache_implementation="fixed")
