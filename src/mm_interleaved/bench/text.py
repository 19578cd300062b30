"""Lines about text: prefill, decoding, and the matrix products of a decode step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..generation import GenerationState, TextSettings
from ..generation.settings import CacheImplementation
from ..generation.text import write, write_beams
from ..generation.workspace import uses_graphs
from ..model import roofline
from ..model.decoder_layer import MMFSDecoderLayer
from ..model.fused import decoding_kernels
from ..model.weights import readable
from ..ops import project, project_gated
from ..ops.scaled_rows import Weights
from .base import Bench, Row, prefilled


def prefill(bench: Bench) -> Iterator[Row]:
    """The prefill of a long prompt with many images, with encoding; the reference has the published form of MMFS."""
    sizes, model, clock = bench.sizes, bench.model, bench.clock

    def work(implementation: CacheImplementation = "auto") -> object:
        return prefilled(bench, sizes.length, sizes.images, implementation)

    value, peak = clock.time(work, 4), clock.peak(work)
    model.set_mmfs_implementation("reference")
    try:
        plain = partial(work, "dynamic")
        reference, reference_peak = clock.time(plain, 1), clock.peak(plain)
    finally:
        model.set_mmfs_implementation("fast")
    need = roofline.prefill(model, bench.cost, sizes.length, sizes.images)
    yield Row("prefill", f"{sizes.length} tokens, {sizes.images} images", "ms", 1e3 * value, 1e3 * reference,
              1e3 * bench.bound(need), peak, reference_peak)  # fmt: skip


def decode(bench: Bench) -> Iterator[Row]:
    """A token by greedy search, sampling and beams; the cache of the reference grows."""
    beams = bench.sizes.beams
    for length, images in bench.sizes.texts:
        case = f"{length} tokens, {images} images"
        yield _writing(bench, length, images, case, TextSettings(num_beams=1))
    length, images = bench.sizes.texts[0]
    case = f"{length} tokens, {images} images"
    yield _writing(bench, length, images, f"{case}, {beams} beams", TextSettings(num_beams=beams), beams)
    yield _writing(bench, length, images, f"{case}, sampled", TextSettings(num_beams=1, do_sample=True))


def decode_by_images(bench: Bench) -> Iterator[Row]:
    """A token by number of visible images, without the reference."""
    config = bench.model.config
    for count in bench.sizes.counts:
        length = 2 + count * (2 + config.num_image_tokens)
        if count < config.mmfs.max_images and length < config.max_context_length:
            row = _writing(bench, length, count, f"{count} images", TextSettings(num_beams=1), reference=False)
            yield replace(row, line="decode-by-images", x=count)


def _writing(
    bench: Bench, length: int, images: int, case: str, settings: TextSettings, rows: int = 1, reference: bool = True
) -> Row:
    """Milliseconds per token, over many tokens; capturing is not counted."""
    sizes = bench.sizes

    def work(implementation: str, tokens: int) -> Callable[[], object]:
        chosen = replace(settings, cache_implementation=implementation, max_new_tokens=tokens, min_new_tokens=tokens)

        state = prefilled(bench, length, images, chosen.cache_implementation)

        def run() -> object:
            if chosen.num_beams > 1:
                return write_beams(state, chosen)
            branch = state.branch([0], tokens=tokens)
            return list(write(branch, chosen, [torch.Generator().manual_seed(0)]))

        return run

    fast = work("static", sizes.tokens)
    value, peak = bench.clock.time(fast, 2), bench.clock.peak(fast)
    plain = bench.clock.time(work("dynamic", sizes.reference_tokens), 1) / sizes.reference_tokens if reference else None
    need = roofline.decoding(bench.model, bench.cost, length, images, rows)
    return Row("decode", case, "ms/token", 1e3 * value / sizes.tokens, None if plain is None else 1e3 * plain,
               1e3 * bench.bound(need), peak)  # fmt: skip


def admission(bench: Bench) -> Iterator[Row]:
    """The start of a generation call on a leased workspace: the state of the modules, and derived weights."""
    length, images = bench.sizes.texts[0]
    graphs = uses_graphs(bench.model, "auto")

    def work() -> object:
        return GenerationState(bench.model, 1, graphs, tokens=length, slots=images, images=images)

    yield Row("admission", "one row", "ms", 1e3 * bench.clock.time(work, bench.sizes.repeats))


def decode_step(bench: Bench) -> Iterator[Row]:
    """The captured step alone, with the kernels and with the library's products; the reference is not captured."""
    length, images = bench.sizes.texts[0]
    cuda, steps = bench.device.type == "cuda", bench.sizes.repeats
    need = roofline.decoding(bench.model, bench.cost, length, images)
    token = torch.tensor([20], device=bench.device)
    reading = torch.ones(1, dtype=torch.bool, device=bench.device)
    for kernels in (False, True) if cuda else (False,):
        times = []
        with decoding_kernels("auto" if kernels else "never"):
            for implementation in ("static", "dynamic") if cuda else ("dynamic",):
                state = prefilled(bench, length, images, implementation, 3 * steps)

                def work(state: GenerationState = state) -> None:
                    for _ in range(steps):
                        state.decode_step(token, reading)
                    state.settle([length])

                times.append(bench.clock.time(work, 1) / steps)
                del state
        case = "Triton kernels" if kernels else "library products"
        yield Row("decode-step", f"{length} tokens, {images} images, {case}", "ms", 1e3 * times[0],
                  1e3 * times[1] if cuda else None, 1e3 * bench.bound(need))  # fmt: skip


def products(bench: Bench) -> Iterator[Row]:
    """The products of a decode step for one row and for several; the reference is the library."""
    if bench.device.type != "cuda":
        raise ValueError("the kernels are for CUDA devices")
    for rows in (1, bench.sizes.beams):
        for name, (work, weights) in _products(bench, rows).items():
            moved = _bytes(weights)
            fused, plain = (_replayed(bench, partial(work, backend=backend)) for backend in ("triton", "plain"))
            yield Row("products", f"{name}, {rows} rows", "us", 1e6 * fused, 1e6 * plain,
                      1e6 * moved / bench.speed.bytes_per_second, note=f"{moved / fused / 1e12:.2f} TB/s")  # fmt: skip


def _bytes(weights: list[Weights]) -> int:
    """The bytes that a product reads."""
    parts = [x for w in weights for x in ((w,) if isinstance(w, torch.Tensor) else (w.data, w.scale))]
    return sum(x.numel() * x.element_size() for x in parts)


def _weights(linear: nn.Module) -> Weights:
    weights = readable(linear)
    assert weights is not None  # the linear layers are plain or quantized here
    return weights


def _products(bench: Bench, rows: int) -> dict[str, tuple[Callable[..., object], list[Weights]]]:
    """By name: the work in one layer (`layer`, `backend`), and the weights that it reads."""
    layers = bench.model.language_model.layers
    width, wide = bench.model.config.text_config.hidden_size, layers[0].mlp.down_proj.in_features
    like = {"device": bench.device, "dtype": bench.dtype}
    x, y = torch.randn(rows, width, **like), torch.randn(rows, wide, **like)
    norm = layers[0].input_layernorm
    normed = {"gain": norm.weight, "eps": norm.variance_epsilon}

    def maps(layer: MMFSDecoderLayer) -> list[Weights]:
        attention = layer.self_attn
        return [_weights(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]

    def both(layer: MMFSDecoderLayer) -> list[Weights]:
        return [_weights(layer.mlp.gate_proj), _weights(layer.mlp.up_proj)]

    def down(layer: MMFSDecoderLayer) -> list[Weights]:
        return [_weights(layer.mlp.down_proj)]

    def out(layer: MMFSDecoderLayer) -> list[Weights]:
        return [_weights(layer.self_attn.o_proj)]

    first = layers[0]
    return {
        "norm, q, k, v": (lambda layer, **o: project(x, maps(layer), **normed, **o), maps(first)),
        "o, residual": (lambda layer, **o: project(x, out(layer), residual=x, **o), out(first)),
        "norm, gate, up": (lambda layer, **o: project_gated(x, *both(layer), **normed, **o), both(first)),
        "down, residual": (lambda layer, **o: project(y, down(layer), residual=x, **o), down(first)),
    }


def _replayed(bench: Bench, work: Callable[[nn.Module], object]) -> float:
    """Seconds per layer of `work`, in a CUDA graph over all layers, whose weights exceed the caches."""
    from ..model.static import capture

    layers = bench.model.language_model.layers

    def chain() -> None:
        for layer in layers:
            work(layer)

    with torch.no_grad():
        graph = capture(chain, bench.device)
    return bench.clock.time(graph, 4) / len(layers)
