"""On a CUDA device: the same results as on the CPU, half precision within its bounds, compiled code, offloading."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mm_interleaved import (
    Document,
    DocumentFinished,
    GenerationSettings,
    Image,
    ImageSettings,
    MMInterleaved,
    MMInterleavedProcessor,
    Text,
    TextSettings,
)
from mm_interleaved.model.image_decoder import NoiseSamples
from mm_interleaved.ops import MMFSInputs, mmfs_attention
from mm_interleaved.pretrained import Loaded, load
from mm_interleaved.processor import Batch
from mm_interleaved.training.config import LossConfig, ShapesConfig
from mm_interleaved.training.graphs import CapturedStep
from mm_interleaved.training.pipeline import prepare_documents

from .conftest import awaken, make_image
from .ops.mmfs_inputs import LEAVES, arguments, cast, run

pytestmark = pytest.mark.gpu
BOUNDS = {torch.bfloat16: 0.06, torch.float16: 0.01}  # of the relative error; as in tests/model/test_model.py


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Float32 products in full precision, so that the CPU is a fair judge."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def there(model: MMInterleaved) -> MMInterleaved:
    """The debug model on the device."""
    return copy.deepcopy(model).to("cuda")


@pytest.fixture(scope="module")
def small() -> Loaded:
    """The small model on the CPU, every part of it awake."""
    loaded = load("small")
    awaken(loaded.model)
    return loaded


def documents() -> list[Document]:
    return [
        Document([Text("a red house"), Image(make_image(1)), Text("and then"), Image(make_image(2)), Text("the end")]),
        Document([Image(make_image(3)), Text("a boat on a lake")]),
        Document([Text("no image at all")]),
    ]


@pytest.fixture
def batch(processor: MMInterleavedProcessor) -> Batch:
    return processor(documents(), training=True)


def draws(model: MMInterleaved, count: int = 3) -> NoiseSamples:
    return model.image_decoder.sample_noise(count, torch.Generator().manual_seed(5))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def test_losses_and_gradients_are_the_cpus(model: MMInterleaved, there: MMInterleaved, batch: Batch) -> None:
    outs = [
        m(**Batch(**batch).to(d), noise_samples=draws(m), return_logits=True)
        for m, d in ((model, "cpu"), (there, "cuda"))
    ]
    assert relative(outs[1].logits, outs[0].logits) < 1e-4
    torch.testing.assert_close(outs[1].loss.cpu(), outs[0].loss, rtol=1e-5, atol=0)
    for m, out in zip((model, there), outs, strict=True):
        m.zero_grad()
        out.loss.backward()
    for (name, a), b in zip(there.named_parameters(), model.parameters(), strict=True):
        if b.grad is not None and b.grad.norm() > 1e-6:
            assert relative(a.grad, b.grad) < 1e-2, name
    model.zero_grad()
    there.zero_grad()


def test_both_forms_of_mmfs_agree(there: MMInterleaved, batch: Batch) -> None:
    plain = copy.deepcopy(there)
    plain.set_mmfs_implementation("reference")
    with torch.no_grad():
        fast, slow = (
            m(**Batch(**batch).to("cuda"), noise_samples=draws(m), return_logits=True) for m in (there, plain)
        )
    assert relative(fast.logits, slow.logits) < 1e-5


SETTINGS = GenerationSettings(
    TextSettings(max_new_tokens=12, min_new_tokens=12, num_beams=1, repetition_penalty=1.3),
    ImageSettings(num_inference_steps=4, guidance_scale=3.0),
    max_turns=6,
    force_image=True,
    stop_at_eos=False,
)


@pytest.mark.parametrize("sample", [False, True])
def test_a_session_is_the_cpus(model: MMInterleaved, there: MMInterleaved, processor, sample: bool) -> None:
    """The same seed gives the same document on any device: the random numbers come from the CPU."""
    settings = replace(SETTINGS, text=replace(SETTINGS.text, do_sample=sample), seed=3)
    results = []
    for m in (model, there):
        ends = [e for e in m.generate_interleaved(documents(), processor, settings) if isinstance(e, DocumentFinished)]
        results.append([e.result.segments for e in sorted(ends, key=lambda e: e.document)])
    for expected, found in zip(*results, strict=True):
        for a, b in zip(expected, found, strict=True):
            if isinstance(a, Text):
                assert a.text == b.text
            elif a.source is not b.source:
                assert np.abs(np.asarray(a.source).astype(int) - np.asarray(b.source)).max() <= 2


def test_beams_and_scores_are_the_cpus(model: MMInterleaved, there: MMInterleaved, processor) -> None:
    prompts = processor(documents(), padding_side="left")
    settings = TextSettings(max_new_tokens=10, num_beams=3)
    expected, found = (m.generate_text(prompts, settings) for m in (model, there))
    assert [[t.all_ids for t in row] for row in expected] == [[t.all_ids for t in row] for row in found]
    options = [[[5, 6, 7], [8]]] * 3
    torch.testing.assert_close(
        torch.tensor(there.score(prompts, options)), torch.tensor(model.score(prompts, options)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_half_precision(small: Loaded, dtype: torch.dtype) -> None:
    """Small model: hidden states and a drawn image against float32 with the same rounded weights."""
    half = copy.deepcopy(small.model).to("cuda", dtype)
    half.image_decoder.vae.float()
    exact = copy.deepcopy(half).float()
    batch = small.processor(documents(), training=True).to("cuda")
    with torch.no_grad():
        a, b = (m(**batch, noise_samples=draws(m)) for m in (half, exact))
    real = batch.attention_mask.bool()
    assert relative(a.last_hidden_state.float()[real], b.last_hidden_state[real]) < BOUNDS[dtype]
    torch.testing.assert_close(a.loss, b.loss, rtol=BOUNDS[dtype], atol=0)
    drawn = [m.generate_images(batch, ImageSettings(num_inference_steps=4), targets=[2]) for m in (half, exact)]
    assert drawn[0].isfinite().all()
    assert (drawn[0] - drawn[1]).abs().mean() < BOUNDS[dtype]


@pytest.mark.slow
def test_compiled(small: Loaded) -> None:
    """Through inductor, training step included."""
    there = copy.deepcopy(small.model).to("cuda")
    compiled = torch.compile(copy.deepcopy(there), dynamic=False)
    batch = small.processor(documents(), training=True).to("cuda")
    expected, found = (m(**batch, noise_samples=draws(m), return_logits=True) for m in (there, compiled))
    assert relative(found.logits, expected.logits) < 1e-3
    found.loss.backward()
    expected.loss.backward()
    for (name, a), b in zip(there.named_parameters(), compiled.parameters(), strict=True):
        if a.grad is not None and a.grad.norm() > 1e-6:
            assert relative(b.grad, a.grad) < 2e-2, name


def test_offloading(model: MMInterleaved, there: MMInterleaved, batch: Batch, tmp_path: Path) -> None:
    """The language model's weights stay in the CPU's memory and visit the device."""
    model.save_pretrained(tmp_path)
    places = {name: 0 for name, _ in model.named_children()} | {"language_model": "cpu"}
    offloaded = MMInterleaved.from_pretrained(tmp_path, device_map=places, dtype=torch.float32)
    with torch.no_grad():
        a, b = (m(**Batch(**batch).to("cuda"), noise_samples=draws(m)).loss for m in (offloaded, there))
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-5)


# The slope of a bilinear sample jumps at a pixel's border. Of N samples N / 10^6 or so lie so near to one that rounding
# decides on the side, each wrong by its own size: sqrt(10^-6) of the norm, and a few times that for wide maps.
AT_BORDERS = 5e-3
LANGUAGE = {"shapes": [(32, 32), (16, 16), (8, 8)], "heads": 16, "points": 8, "dim": 64}
REAL = {  # release size
    "tokens": {**LANGUAGE, "groups": 2048, "images": 15, "slots": 15},
    "one token": {**LANGUAGE, "groups": 1, "images": 15, "slots": 15},
    "a map": {**LANGUAGE, "shapes": [(64, 64), *LANGUAGE["shapes"]], "groups": 2, "queries": 4096, "images": 2,
              "slots": 1},
    "small model": {"shapes": [(16, 16), (8, 8), (4, 4)], "heads": 8, "points": 4, "dim": 16, "groups": 1500,
                    "images": 20, "slots": 7},
}  # fmt: skip


@pytest.mark.parametrize("case", REAL)
def test_mmfs_kernels_at_real_sizes(case: str) -> None:
    """Float32 as the reference in float64, but for the two roundings that pixels of a wide map cost."""
    given = arguments(**REAL[case], device="cuda")
    found, expected = run(given, "triton"), run(cast(given, torch.float64), "plain")
    for name, x in expected.items():
        assert relative(found[name], x) < (AT_BORDERS if "offset" in name else 2e-5), name


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("case", REAL)
def test_mmfs_kernels_in_half_precision(case: str, dtype: torch.dtype) -> None:
    """Exact for the rounded inputs, gradients rounded once."""
    given = arguments(**REAL[case], dtype=dtype, device="cuda")
    found, expected = run(given, "triton"), run(cast(given, torch.float32), "plain")
    for name, x in expected.items():
        rounding = torch.finfo(dtype).eps if name in LEAVES else 2e-5
        assert relative(found[name], x) < max(rounding, AT_BORDERS if "offset" in name else 0), name


def test_mmfs_kernels_are_the_choice_and_run_in_a_graph() -> None:
    """One token, recorded once: no host takes part in a replay, whatever images it sees then."""
    given = arguments(**REAL["one token"], dtype=torch.bfloat16, device="cuda")
    assert torch.equal(mmfs_attention(MMFSInputs(**given))[0], mmfs_attention(MMFSInputs(**given), backend="triton")[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed, ignored = mmfs_attention(MMFSInputs(**given))
    given["images"].copy_(torch.where(torch.arange(15, device="cuda") < 4, given["images"], -1))
    given["values"].normal_()
    graph.replay()
    expected = mmfs_attention(MMFSInputs(**given))
    torch.testing.assert_close((mixed, ignored), expected, rtol=0, atol=0)


def test_deterministic_mmfs_kernels_at_real_size() -> None:
    given = arguments(**REAL["tokens"], device="cuda")
    before = run(given, "triton")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(given, "triton"), run(given, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in before.items():
        assert torch.equal(first[name], second[name]), name
        assert relative(first[name], x) < 1e-5, name


class Halved(torch.nn.Module):
    """A model under autocast, as `accelerate` prepares it."""

    def __init__(self, model: MMInterleaved) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        with torch.autocast("cuda", torch.bfloat16):
            return self.model(**inputs)


@pytest.mark.parametrize(("halved", "bounds"), [(False, (1e-5, 1e-5, 1e-3)), (True, (1e-3, 1e-3, 2e-2))])
def test_a_captured_step_computes_the_same(small: Loaded, halved: bool, bounds: tuple[float, ...]) -> None:
    """Losses and gradients through CUDA graphs, for batches of the recorded sizes and for one of others."""
    model = copy.deepcopy(small.model).to("cuda").train()
    called = Halved(model) if halved else model
    shapes = ShapesConfig(1, images=5, targets=3, conditioning=2, context=96, labelled=150, visible=3, graph=True)
    step = CapturedStep(shapes)
    prepare = prepare_documents(model, LossConfig(), shapes)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for seed, count in enumerate([3, 3, 3, 2]):
        images = [Image(make_image(10 * seed + n)) for n in range(count)]
        batch = small.processor(Document([Text("a red house"), *images, Text("the end" * seed)]), training=True)
        fill = {"input_ids": small.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        for name, value in fill.items():
            row = batch[name]
            batch[name] = torch.nn.functional.pad(row, (0, 128 - row.shape[1]), value=value)
        inputs = prepare(batch, seed, torch.device("cuda"))
        inputs.pop("stats")
        found = []
        for call in (lambda m, x: m(**x), step):
            model.zero_grad()
            outputs = call(called, inputs)
            outputs.loss.backward()
            losses = outputs.loss.detach(), outputs.loss_img.detach()
            del outputs  # what its graph keeps alive cannot be recorded
            found.append((*losses, torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])))
        for a, b, bound in zip(*found, bounds, strict=True):
            assert relative(b, a) < bound
        with torch.no_grad():
            for parameter in parameters:  # a recording reads the weights as they are now
                parameter.mul_(0.99)
    assert (step.replayed, step.uncaptured) == (3, 1)
