"""On a CUDA device: recorded steps and the kernels of decoding against their plain references, in all precisions."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mm_interleaved import GenerationSettings, ImageSettings, MMInterleaved, TextSettings
from mm_interleaved.checkpoints.quantization import quantize
from mm_interleaved.generation import GenerationState, InterleavedGenerator, workspace
from mm_interleaved.model.fused import decoding_kernels
from mm_interleaved.model.mmfs import VisibleImages
from mm_interleaved.ops import attend, project, project_gated
from mm_interleaved.pretrained import Loaded

from .generation.test_interleaved import ragged, run, same
from .generation.test_kv_cache import KINDS
from .generation.test_text import prompts
from .model.test_denoising import earlier
from .test_gpu import BOUNDS, _exact_products, relative, small, there  # noqa: F401

pytestmark = pytest.mark.gpu
KERNELS = pytest.mark.parametrize("kernels", [False, True], ids=["library", "kernels"])


def texts(model: MMInterleaved, batch, settings: TextSettings, kind: str, seed: int = 5) -> list:
    settings = replace(settings, cache_implementation=kind)
    rows = model.generate_text(batch, settings, torch.Generator().manual_seed(seed))
    return [[(t.ids, t.end) for t in row] for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_captured_decoding(model: MMInterleaved, there: MMInterleaved, processor, kind: str) -> None:  # noqa: F811
    """Float32, ragged batches: the tokens of called steps and of a CPU; the second text replays the first graph."""
    batch = prompts(processor)
    expected = texts(model, batch, KINDS[kind], "dynamic")
    assert texts(there, batch, KINDS[kind], "dynamic") == expected
    for _ in range(2):
        assert texts(there, batch, KINDS[kind], "static") == expected


@pytest.mark.parametrize("sample", [False, True])
def test_captured_sessions(there: MMInterleaved, processor, sample: bool) -> None:  # noqa: F811
    results = []
    for kind in ("static", "dynamic"):
        text = replace(KINDS["greedy"], max_new_tokens=9, do_sample=sample, cache_implementation=kind)
        image = ImageSettings(num_inference_steps=3, guidance_scale=2.0, cache_implementation=kind)
        settings = GenerationSettings(text, image, max_turns=6, force_image=True, stop_at_eos=False)
        results.append(run(InterleavedGenerator(there, processor, settings), ragged())[0])
    for a, b in zip(*results, strict=True):
        assert all(same(x, y) for x, y in zip(a, b, strict=True))


def test_a_new_session_captures_nothing(there: MMInterleaved, processor, monkeypatch) -> None:  # noqa: F811
    """Two sessions at once need two workspaces; the third finds them idle."""
    workspace.POOL.clear()
    captured = []
    original = workspace.capture
    monkeypatch.setattr(workspace, "capture", lambda step, device: captured.append(1) or original(step, device))
    text = replace(KINDS["greedy"], max_new_tokens=5, cache_implementation="static")
    settings = GenerationSettings(text, ImageSettings(num_inference_steps=2), max_turns=4, force_image=True)
    generators = [InterleavedGenerator(there, processor, settings, progress=False) for _ in range(2)]
    for _ in zip(*(g.run(ragged()) for g in generators), strict=True):
        pass
    assert len(captured) == 6  # derived weights, a step and a block of image tokens for each
    del generators
    run(InterleavedGenerator(there, processor, settings), ragged())
    assert len(captured) == 6


def forced(model: MMInterleaved, batch, tokens: Tensor, graphs: bool, kernels: str = "auto") -> Tensor:
    """Logits [steps, rows, vocab] after each of given tokens [steps, rows]."""
    with decoding_kernels(kernels):
        state = GenerationState(model, tokens.shape[1], graphs, tokens=400)
        state.prefill(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
        reading = torch.ones(tokens.shape[1], dtype=torch.bool, device="cuda")
        return torch.stack([state.decode_step(step, reading).clone() for step in tokens])


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, *BOUNDS], ids=str)
def test_logits_of_captured_steps(small: Loaded, kernels: bool, dtype: torch.dtype) -> None:  # noqa: F811
    """Small model: in float32 the exact logits; in half precision about as near to them as called modules are."""
    half = copy.deepcopy(small.model).to("cuda", dtype)
    half.image_decoder.vae.float()
    exact = copy.deepcopy(half).float()
    tokens = torch.randint(20, 900, (12, 3), generator=torch.Generator().manual_seed(0)).cuda()
    batch = prompts(small.processor)
    truth = forced(exact, batch, tokens, False, "never")
    called = relative(forced(half, batch, tokens, False, "never"), truth)
    fast = relative(forced(half, batch, tokens, True, "auto" if kernels else "never"), truth)
    assert fast < (2e-5 if dtype == torch.float32 else max(1.5 * called, BOUNDS[dtype] / 2)), (fast, called)


@pytest.mark.parametrize("dtype", [torch.float32, *BOUNDS], ids=str)
def test_quantized_steps(small: Loaded, dtype: torch.dtype) -> None:  # noqa: F811
    """The kernels read the whole numbers that torchao's own product widens."""
    pytest.importorskip("torchao")
    model = copy.deepcopy(small.model).to("cuda", dtype)
    quantize(model, "int8")
    tokens = torch.randint(20, 900, (6, 3), generator=torch.Generator().manual_seed(0)).cuda()
    found = [forced(model, prompts(small.processor), tokens, True, kernels) for kernels in ("auto", "never")]
    assert relative(*found) < (2e-5 if dtype == torch.float32 else BOUNDS[dtype])


@pytest.mark.parametrize("kernels", ["auto", "never"])
def test_greedy_tokens_of_the_small_model(small: Loaded, kernels: str) -> None:  # noqa: F811
    there = copy.deepcopy(small.model).to("cuda")  # noqa: F811
    settings = TextSettings(max_new_tokens=60, min_new_tokens=60, num_beams=1)
    batch = prompts(small.processor)
    with decoding_kernels(kernels):
        assert texts(there, batch, settings, "static") == texts(there, batch, settings, "dynamic")


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_adapters_and_new_weights_are_seen(small: Loaded, implementation: str) -> None:  # noqa: F811
    """An adapter, switched off and on, merged, and weights written past PyTorch's counters, each by the next call."""
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(small.model).to("cuda")
    batch = prompts(small.processor)
    settings = TextSettings(max_new_tokens=12, min_new_tokens=12, num_beams=1)
    plain = texts(model, batch, settings, implementation)
    linears = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n.startswith("language_model.")]
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=linears, init_lora_weights=False))
    adapted = texts(model, batch, settings, implementation)
    assert adapted != plain
    with wrapped.disable_adapter():
        assert texts(model, batch, settings, implementation) == plain
    assert texts(model, batch, settings, implementation) == adapted
    merged = wrapped.merge_and_unload()
    assert texts(merged, batch, settings, implementation) == adapted
    for layer in merged.language_model.layers:
        if layer.synchronizer is not None:
            layer.synchronizer.mmfs.dynamic_offset_mask.weight.data.mul_(3)
            layer.synchronizer.gate.data.fill_(2.0)
    changed = texts(merged, batch, settings, implementation)
    assert changed != adapted
    assert texts(copy.deepcopy(merged), batch, settings, implementation) == changed


# ---- images


def drawn(model: MMInterleaved, images: list[list[int]], kind: str, seed: int = 2, **options: object) -> Tensor:
    decoder = model.image_decoder
    seen = earlier_on(model, images, seed)
    settings = ImageSettings(**{"num_inference_steps": 4, "cache_implementation": kind, **options})
    generator = torch.Generator().manual_seed(seed)
    queries = decoder.config.resampler
    given = torch.randn(len(images), queries.num_queries, queries.hidden_size, generator=generator).to(
        "cuda", model.dtype
    )
    return torch.stack([s.latents for s in decoder.denoise(given, seen, settings, generator)])


def earlier_on(model: MMInterleaved, images: list[list[int]], seed: int):
    seen = earlier(model, images, seed)
    seen.features, seen.normed = (x.to("cuda", model.dtype) for x in (seen.features, seen.normed))
    seen.visible = VisibleImages(seen.visible.images.cuda())
    return seen


@pytest.mark.parametrize("images", [[[0]], [[1], [-1]], [[]]])
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_recorded_denoising(there: MMInterleaved, images: list, scheduler: str) -> None:  # noqa: F811
    """Float32; a second image of the same shape replays the first one's recording."""
    for seed in (2, 3):
        found, expected = (drawn(there, images, kind, seed, scheduler=scheduler) for kind in ("static", "dynamic"))
        assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_recorded_denoising_in_half_precision(small: Loaded, dtype: torch.dtype) -> None:  # noqa: F811
    half = copy.deepcopy(small.model).to("cuda", dtype)
    half.image_decoder.vae.float()
    exact = copy.deepcopy(half).float()
    expected = drawn(exact, [[0]], "dynamic")
    fast, reference = (relative(drawn(half, [[0]], kind), expected) for kind in ("static", "dynamic"))
    assert fast < max(1.5 * reference, BOUNDS[dtype] / 2), (fast, reference)


def test_pixels_in_bfloat16(small: Loaded) -> None:  # noqa: F811
    """How far the VAE in bfloat16 is from float32 is for the benchmark to say; here it is only near."""
    decoder = copy.deepcopy(small.model.image_decoder).to("cuda")
    latents = torch.randn(decoder.latent_shape(2)).cuda()
    assert (decoder.decode(latents, half=True) - decoder.decode(latents)).abs().mean() < 0.02


# ---- kernels at the release's sizes


@pytest.mark.parametrize("dtype", [torch.float32, *BOUNDS], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_products_at_real_sizes(rows: int, dtype: torch.dtype) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    bound = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    x, gain, residual = random(rows, 5120), random(5120), random(rows, 5120)
    maps, biases = [random(n, 5120) / 70 for n in (5120, 1024, 1024)], [random(5120), None, random(1024)]
    wide, down, gate = random(rows, 13824), random(5120, 13824) / 110, [random(13824, 5120) / 70 for _ in range(2)]
    calls = [
        (project, (x, maps, biases), {"gain": gain, "eps": 1e-6}),
        (project, (wide, [down]), {"residual": residual}),
        (project_gated, (x, *gate), {"gain": gain, "eps": 1e-6}),
    ]

    def as_float(value: object) -> object:
        if isinstance(value, Tensor):
            return value.double()
        return [as_float(v) for v in value] if isinstance(value, list) else value

    for call, arguments, options in calls:
        found = call(*arguments, **options, backend="triton")
        exact = call(*(as_float(a) for a in arguments), **{k: as_float(v) for k, v in options.items()})
        assert relative(found, exact) < bound


@pytest.mark.parametrize("dtype", [torch.float32, *BOUNDS], ids=str)
@pytest.mark.parametrize(("rows", "key_heads"), [(1, 40), (5, 40), (1, 8)])
def test_attention_at_real_sizes(rows: int, key_heads: int, dtype: torch.dtype) -> None:
    heads, dim, columns = 40, 128, 1024
    query, key, value = (torch.randn(rows, h * dim, device="cuda").to(dtype) for h in (heads, key_heads, key_heads))
    angles = torch.randn(rows, dim // 2, device="cuda").repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = (torch.randn(rows, key_heads, columns, dim, device="cuda").to(dtype) for _ in range(2))
    source = torch.randint(0, rows, (rows, columns), device="cuda")
    for last in (0, 63, 64, 700, 1023):
        source[:, last] = torch.arange(rows, device="cuda")
        kept = keys.clone(), values.clone()
        for shared in (source, None):
            at = torch.full((rows,), last, device="cuda")
            if shared is None:  # rows of different lengths
                at = (at - torch.arange(rows, device="cuda")).clamp(min=0)
            found = attend(query, key, value, cos, sin, *kept, at, dim**-0.5, shared, backend="triton")
            wide = [x.float() for x in (query, key, value, cos, sin, keys, values)]
            expected = attend(*wide, at, dim**-0.5, shared)
            assert relative(found, expected) < (2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
