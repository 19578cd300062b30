"""Lines about images: generation, VAE, encoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from ..generation import IMAGE_PRESETS, GenerationState, ImageSettings
from ..generation.image_encoder import encode_images
from ..generation.workspace import why_not_graphs
from ..model import MMInterleavedConfig, roofline
from ..model.language_model import image_features, synchronizers
from ..model.vit_adapter import DeformableAttention, cell_centres
from ..ops import why_not_triton
from ..ops.mmfs_attention import Backend
from .base import Bench, Row, prefilled


def image(bench: Bench) -> Iterator[Row]:
    """An image from its context to its pixels; the reference calls the UNet without CUDA graphs.

    With and without an earlier image, then with faster schedulers, and with a compiled UNet if requested.
    """
    sizes, settings = bench.sizes, ImageSettings(num_inference_steps=bench.sizes.steps)
    length, images = sizes.image_context
    state = prefilled(bench, length, images)
    case = f"{sizes.steps} steps, {length} tokens, {images} images"
    yield _drawn(bench, state, case, settings)
    yield _drawn(bench, prefilled(bench, length, 0), f"{sizes.steps} steps, {length} tokens, no image", settings)
    for name, preset in IMAGE_PRESETS.items():
        if not preset.lossless and sizes.steps >= preset.settings.num_inference_steps:
            yield replace(_drawn(bench, state, name, preset.settings, reference=False), lossless=False)
    if bench.compile:
        yield _drawn(bench, state, f"{case}, compiled", replace(settings, compile=True), reference=False)


def _drawn(bench: Bench, state: GenerationState, case: str, settings: ImageSettings, reference: bool = True) -> Row:
    def work(implementation: str) -> Callable[[], object]:
        chosen = replace(settings, cache_implementation=implementation)
        return lambda: draw(bench, state, chosen)

    value = bench.clock.time(work("static"), 2)
    peak = bench.clock.peak(work("static"))
    plain = bench.clock.time(work("dynamic"), 1) if reference else None
    plain_peak = bench.clock.peak(work("dynamic")) if reference else None
    cost, steps = bench.cost, settings.num_inference_steps
    cost = replace(cost, steps=steps, draw_image=cost.draw_image + (steps - cost.steps) * cost.draw_step)
    need = roofline.image(bench.model, cost)
    return Row("image", case, "s", value, plain, bench.bound(need), peak, plain_peak)


@torch.no_grad()
def draw(bench: Bench, state: GenerationState, settings: ImageSettings) -> torch.Tensor:
    """Generate the next image of a state."""
    decoder = bench.model.image_decoder
    conditions = decoder.resampler(*state.image_context([0]))
    generators = [torch.Generator().manual_seed(settings.seed)]
    *_, last = decoder.denoise(conditions, state.earlier_images([0]), settings, generators)
    return decoder.decode(last.latents, settings.decode_dtype == "bfloat16")


def pixels(bench: Bench) -> Iterator[Row]:
    """The VAE's decoder in bfloat16 and float32, and the difference of the images."""
    decoder = bench.model.image_decoder
    latents = torch.randn(decoder.latent_shape(1), generator=torch.Generator().manual_seed(0)).to(bench.device)
    half, exact = (decoder.decode(latents, h) for h in (True, False))
    apart = float((half - exact).abs().max()) * 255
    values = [bench.clock.time(lambda h=h: decoder.decode(latents, h)) for h in (True, False)]
    need = roofline.Need(bytes=sum(p.numel() * p.element_size() for p in decoder.vae.decoder.parameters()))
    yield Row("pixels", "VAE in bfloat16", "ms", 1e3 * values[0], 1e3 * values[1], 1e3 * bench.bound(need),
              lossless=apart <= 1, note=f"at most {apart:.2f} of 255 apart (random weights)")  # fmt: skip


def encode(bench: Bench) -> Iterator[Row]:
    """Encoding images: image tokens, maps, values for every layer; the reference uses no CUDA graph."""
    model, graphs = bench.model, why_not_graphs(bench.model) is None
    layers = synchronizers(model.language_model)
    derived = [layer.derive() for layer in layers]

    def values(pyramid: list[torch.Tensor]) -> object:
        features = image_features(model.config, pyramid).features
        return [layer.project(features) for layer in layers]

    for count in (1, bench.sizes.images):
        images = bench.noise[:count]
        with torch.no_grad():

            def fast(images=images) -> object:
                return values(encode_images(model, images, graphs).pyramid)

            def plain(images=images) -> object:
                return [layer.derive(d) for layer, d in zip(layers, derived, strict=True)], values(
                    model.encode_images(images).pyramid
                )

            value, reference = (bench.clock.time(work, bench.sizes.repeats) for work in (fast, plain))
            peak = bench.clock.peak(fast)
        need = roofline.Need(2 * bench.cost.encode_image * count)
        case = f"{count} image{'s' if count > 1 else ''}"
        yield Row("encode", case, "ms", 1e3 * value, 1e3 * reference, 1e3 * bench.bound(need), peak)


def adapter(bench: Bench) -> Iterator[Row]:
    """The ViT adapter's attention by the kernels of MMFS; the reference is made of PyTorch operators."""
    config = MMInterleavedConfig.preset(bench.preset)
    grid = config.vision_config.image_size // config.vision_config.patch_size
    stem = [2 * grid, grid, grid // 2]
    for name, looking, seen in (("inject", [grid], stem), ("extract", stem, [grid])):
        attention = DeformableAttention(config.vision_config.hidden_size, config.adapter, len(seen))
        attention.to(bench.device, bench.dtype)
        for gradients in (False, True):
            yield _adapter_row(bench, attention, name, looking, seen, gradients)


def _adapter_row(
    bench: Bench, attention: DeformableAttention, name: str, looking: list[int], seen: list[int], gradients: bool
) -> Row:
    def random(sides: list[int]) -> torch.Tensor:
        shape = bench.sizes.images, sum(side * side for side in sides), attention.value_proj.in_features
        return torch.randn(shape, device=bench.device, dtype=bench.dtype, requires_grad=gradients)

    query, features = random(looking), random(seen)
    reference, shapes = cell_centres(looking, bench.device), [(side, side) for side in seen]
    reason = why_not_triton(attention.value_proj(features).unflatten(-1, (attention.heads, -1)), attention.points)

    def run(backend: Backend) -> torch.Tensor:
        attention.backend = backend
        with torch.set_grad_enabled(gradients):
            out = attention(query, reference, features, shapes)
            if gradients:
                out.float().square().mean().backward()
        return out.detach().float()

    kernels = bench.device.type == "cuda" and reason is None
    backends: list[Backend] = ["triton", "plain"] if kernels else ["plain"]
    found = [run(backend) for backend in backends]
    times = [1e3 * bench.clock.time(partial(run, backend), bench.sizes.repeats) for backend in backends]
    note = f"{float((found[0] - found[1]).norm() / found[1].norm()):.1e} apart" if kernels else f"plain: {reason}"
    case = f"{name}, {bench.sizes.images} images, {'with backward' if gradients else 'forward'}"
    return Row("adapter", case, "ms", times[0], times[1] if kernels else None, note=note)
