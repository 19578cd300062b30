"""Sampling and the training loss of the image decoder."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from mm_interleaved import ImageSettings, MMInterleaved
from mm_interleaved.model.image_decoder import ImageDecoder, NoiseSamples
from mm_interleaved.model.unet import EarlierImages


@pytest.fixture
def decoder(model: MMInterleaved) -> ImageDecoder:
    return model.image_decoder


def conditions(decoder: ImageDecoder, count: int = 1) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, decoder.config.resampler.num_queries, decoder.config.resampler.hidden_size)


def earlier(model: MMInterleaved, images: list[list[int]]) -> EarlierImages:
    torch.manual_seed(2)
    pyramid = [torch.randn(2, model.config.vision_config.hidden_size, s, s) for s in model.config.pyramid_sides]
    return EarlierImages.build(pyramid, torch.tensor(images))


def steps_of(decoder: ImageDecoder, seen: EarlierImages, seed: int = 0, **options: object) -> list:
    settings = ImageSettings(**{"num_inference_steps": 4, **options})
    generator = torch.Generator().manual_seed(seed)
    return list(decoder.denoise(conditions(decoder, len(seen.visible.images)), seen, settings, generator))


@pytest.mark.parametrize(
    ("steps", "head", "tail"), [(30, [958, 925], [34, 1]), (250, [997], [5, 1]), (7, [853, 711], [143, 1])]
)
def test_timesteps(decoder: ImageDecoder, model: MMInterleaved, steps: int, head: list[int], tail: list[int]) -> None:
    scheduler = copy.deepcopy(decoder.scheduler)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    assert len(times) == steps
    assert times[: len(head)] == head
    assert times[-len(tail) :] == tail


@pytest.fixture(params=["epsilon", "v_prediction"])
def predicting(decoder: ImageDecoder, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The decoder, made for one kind of prediction."""
    monkeypatch.setitem(decoder.config.scheduler, "prediction_type", request.param)
    monkeypatch.setitem(decoder.__dict__, "scheduler", DDPMScheduler(**decoder.config.scheduler))
    return request.param


def test_one_step_against_the_formula(decoder: ImageDecoder, model: MMInterleaved, predicting: str) -> None:
    """Ancestral DDPM; noise is added in every step, also in the last."""
    steps = steps_of(decoder, earlier(model, [[0]]), guidance_scale=1.0, num_inference_steps=4)
    generator = torch.Generator().manual_seed(0)
    shape = decoder.latent_shape(1)
    x = torch.randn(shape, generator=generator)
    alphas = decoder.scheduler.alphas_cumprod.double()
    for step in steps:
        t, previous = step.timestep, step.timestep - 250
        a_t, a_prev = alphas[t], alphas[previous] if previous >= 0 else torch.tensor(1.0).double()
        alpha, beta = a_t / a_prev, 1 - a_t / a_prev
        if predicting == "epsilon":
            clean = (x - (1 - a_t).sqrt() * step.prediction) / a_t.sqrt()
        else:
            clean = a_t.sqrt() * x - (1 - a_t).sqrt() * step.prediction
        mean = a_prev.sqrt() * beta / (1 - a_t) * clean + alpha.sqrt() * (1 - a_prev) / (1 - a_t) * x
        variance = ((1 - a_prev) / (1 - a_t) * beta).clamp(min=1e-20)
        x = mean + variance.sqrt() * torch.randn(shape, generator=generator)
        torch.testing.assert_close(step.latents.double(), x.double(), rtol=1e-5, atol=1e-5)
        x = step.latents.double()
    assert [s.timestep for s in steps] == [751, 501, 251, 1]


def test_guidance_mixes_both_predictions(decoder: ImageDecoder, model: MMInterleaved) -> None:
    """The unconditional half swaps the conditions for the learned ones and sees the same images."""
    seen, given = earlier(model, [[0]]), conditions(decoder)
    guided = steps_of(decoder, seen, guidance_scale=3.0)[0]
    start = torch.randn(decoder.latent_shape(1), generator=torch.Generator().manual_seed(0))
    time = torch.tensor(guided.timestep)
    with torch.no_grad():
        with_context = decoder.unet(start, time, given, seen)
        without = decoder.unet(start, time, decoder.negative_prompt(), seen)
    torch.testing.assert_close(guided.prediction, without + 3 * (with_context - without), rtol=1e-4, atol=1e-5)


def test_the_unconditional_half_can_be_blindfolded(decoder: ImageDecoder, model: MMInterleaved) -> None:
    seen, blind = earlier(model, [[0]]), earlier(model, [[-1]])
    guided = steps_of(decoder, seen, guidance_scale=3.0, unconditional_sees_images=False)[0]
    start = torch.randn(decoder.latent_shape(1), generator=torch.Generator().manual_seed(0))
    time = torch.tensor(guided.timestep)
    with torch.no_grad():
        with_context = decoder.unet(start, time, conditions(decoder), seen)
        without = decoder.unet(start, time, decoder.negative_prompt(), blind)
    torch.testing.assert_close(guided.prediction, without + 3 * (with_context - without), rtol=1e-4, atol=1e-5)


def test_guidance_of_one_is_off(decoder: ImageDecoder, model: MMInterleaved) -> None:
    rows: list[int] = []
    hook = decoder.unet.conv_in.register_forward_hook(lambda _m, a, _o: rows.append(len(a[0])))
    steps_of(decoder, earlier(model, [[0]]), guidance_scale=1.0)
    steps_of(decoder, earlier(model, [[0]]), guidance_scale=1.5)
    hook.remove()
    assert rows == [1] * 4 + [2] * 4


def test_the_model_says_how_strong_guidance_is(
    decoder: ImageDecoder, model: MMInterleaved, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = earlier(model, [[0]])
    monkeypatch.setattr(decoder.config, "guidance_scale", 2.5)
    own, asked, other = (steps_of(decoder, seen, guidance_scale=g)[-1].latents for g in (None, 2.5, 3.0))
    assert torch.equal(own, asked)
    assert not torch.equal(own, other)
    assert decoder.settled(ImageSettings()).guidance_scale == 2.5


def test_one_generator_each_makes_images_independent_of_the_batch(decoder: ImageDecoder, model: MMInterleaved) -> None:
    settings = ImageSettings(num_inference_steps=3)
    given, images = conditions(decoder, 2), [[0], [-1]]
    generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
    together = list(decoder.denoise(given, earlier(model, images), settings, generators))[-1].latents
    for i in range(2):
        generator = [torch.Generator().manual_seed(5 + i)]
        alone = list(decoder.denoise(given[i : i + 1], earlier(model, images[i : i + 1]), settings, generator))[
            -1
        ].latents
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


SCHEDULERS = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
WORKING = [
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
]  # fmt: skip


@pytest.mark.parametrize("name", WORKING)
def test_other_schedulers(decoder: ImageDecoder, model: MMInterleaved, name: str) -> None:
    steps = steps_of(decoder, earlier(model, [[0]]), scheduler=name, num_inference_steps=5, preview_every=2)
    image = decoder.decode(steps[-1].latents)
    assert image.isfinite().all()
    assert steps[-1].index == steps[-1].total
    assert steps[1].preview.shape == image.shape


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_works_or_is_refused_before_it_starts(decoder: ImageDecoder, name: str) -> None:
    refused = []
    for count in (1, 5, 1000, 2000):
        try:
            scheduler = decoder.sampler(ImageSettings(scheduler=name, num_inference_steps=count))
        except ValueError as error:
            refused.append((count, str(error)))
            continue
        latents = torch.zeros(1, 1, 1, 1)
        for timestep in scheduler.timesteps[:6]:
            scheduler.scale_model_input(latents, timestep)
            latents = scheduler.step(torch.ones_like(latents), timestep, latents).prev_sample
        assert latents.isfinite().all()
    counts = [count for count, _ in refused]
    assert 2000 in counts
    assert 5 not in counts or name not in WORKING
    assert all(name in words for _, words in refused)
    if 1000 not in counts:
        assert "does not support num_inference_steps=2000; the model has 1000, take fewer" in refused[-1][1]


def test_the_largest_seed_leaves_room() -> None:
    settings = ImageSettings(seed=2**63 - 1, num_candidates=2)
    assert torch.Generator().manual_seed(settings.seed + settings.num_candidates)


@pytest.mark.parametrize("name", ["SchedulerMixin ", "torch", "MagicScheduler", "DDPMPipeline"])
def test_unknown_schedulers(name: str) -> None:
    with pytest.raises(ValueError, match="is not a diffusers scheduler"):
        ImageSettings(scheduler=name)


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 0},
        {"num_candidates": 0},
        {"preview_every": -1},
        {"seed": -1},
        {"seed": 2**63},
        {"guidance_scale": float("inf")},
    ],
)
def test_impossible_settings(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        ImageSettings(**change)


def test_previews_come_when_asked(decoder: ImageDecoder, model: MMInterleaved) -> None:
    steps = steps_of(decoder, earlier(model, [[0]]), num_inference_steps=5, preview_every=2)
    assert [s.preview is not None for s in steps] == [False, True, False, True, False]
    assert 0 <= steps[1].preview.min() <= steps[1].preview.max() <= 1


# ---- training loss


def loss_inputs(model: MMInterleaved, lengths: list[int]) -> dict:
    decoder, count = model.image_decoder, len(lengths)
    torch.manual_seed(3)
    size, longest = decoder.config.image_size, max(lengths)
    return {
        "context": torch.randn(count, longest, model.config.text_config.hidden_size),
        "context_mask": (torch.arange(longest) < torch.tensor(lengths)[:, None]).long(),
        "earlier": earlier(model, [[-1]] * count),
        "images": torch.rand(count, 3, size, size),
        "noise_samples": decoder.sample_noise(count, torch.Generator().manual_seed(0)),
    }


@torch.no_grad()
def test_images_without_context_count_zero_but_count(model: MMInterleaved) -> None:
    """A context of <s> and SOI gives no loss, and stays in the denominator."""
    inputs = loss_inputs(model, [5, 2, 5])
    whole = model.image_decoder.loss(**inputs)
    masked = model.image_decoder.loss(**inputs, image_loss_mask=torch.tensor([1.0, 0.0, 1.0]))
    assert whole == masked > 0
    normalized = model.image_decoder.loss(**inputs, normalize=True)
    torch.testing.assert_close(normalized, whole * 3 / 2)
    assert model.image_decoder.loss(**loss_inputs(model, [2, 1])) == 0


@torch.no_grad()
def test_loss_mask_takes_any_image(model: MMInterleaved) -> None:
    inputs = loss_inputs(model, [5, 5])
    parts = [model.image_decoder.loss(**inputs, image_loss_mask=torch.tensor(m)) for m in ([1.0, 0.0], [0.0, 1.0])]
    torch.testing.assert_close(sum(parts), model.image_decoder.loss(**inputs))


@torch.no_grad()
def test_dropped_contexts_become_the_learned_one(model: MMInterleaved) -> None:
    decoder, inputs = model.image_decoder, loss_inputs(model, [5, 5])
    seen: list[Tensor] = []
    hook = decoder.unet.register_forward_hook(lambda _m, a, _o: seen.append(a[2]))
    inputs["noise_samples"].unconditional = torch.tensor([0.09, 0.11])  # one below, one above the probability of 0.1
    decoder.loss(**inputs)
    hook.remove()
    assert torch.equal(seen[0][0], decoder.negative_prompt()[0])
    assert not torch.equal(seen[0][1], decoder.negative_prompt()[0])


@torch.no_grad()
def test_velocity_target(model: MMInterleaved) -> None:
    decoder = copy.deepcopy(model.image_decoder)
    decoder.config.scheduler = decoder.config.scheduler | {"prediction_type": "v_prediction"}
    decoder.__dict__.pop("scheduler", None)
    inputs = loss_inputs(model, [5])
    predicted: list[Tensor] = []
    hook = decoder.unet.register_forward_hook(lambda _m, _a, out: predicted.append(out))
    loss = decoder.loss(**inputs)
    hook.remove()
    latents = decoder.encode(inputs["images"], inputs["noise_samples"].posterior)
    alpha = decoder.scheduler.alphas_cumprod[inputs["noise_samples"].timesteps].view(-1, 1, 1, 1)
    target = alpha.sqrt() * inputs["noise_samples"].noise - (1 - alpha).sqrt() * latents
    torch.testing.assert_close(loss, (predicted[0] - target).square().mean())


def test_draws_are_reproducible(decoder: ImageDecoder) -> None:
    a, b = (decoder.sample_noise(3, torch.Generator().manual_seed(4)) for _ in range(2))
    for name in ("unconditional", "posterior", "noise", "timesteps"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert isinstance(a, NoiseSamples)
    assert ((a.timesteps >= 0) & (a.timesteps < 1000)).all()


def test_decoding_in_parts_changes_nothing(decoder: ImageDecoder) -> None:
    latents = torch.randn(3, *decoder.latent_shape(1)[1:])
    whole = decoder.decode(latents)
    size, decoder.config.vae_batch_size = decoder.config.vae_batch_size, 1
    try:
        torch.testing.assert_close(decoder.decode(latents), whole, rtol=1e-4, atol=1e-4)
    finally:
        decoder.config.vae_batch_size = size
