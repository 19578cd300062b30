"""Weights of 8 and 4 bits: which are, how near they are, and that everything else works with them."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from mm_interleaved import Document, Image, MMInterleaved, MMInterleavedProcessor, Text, TextSettings
from mm_interleaved.checkpoints.quantization import (
    QUANTIZATIONS,
    FrozenQuantization,
    Quantization,
    QuantizedLinear,
    quantize,
    quantize_frozen,
    store,
    stored_bytes,
)
from mm_interleaved.evaluation.run import weights_digest
from mm_interleaved.model.fused import decoding_kernels
from mm_interleaved.model.weights import is_quantized, readable, stored
from mm_interleaved.ops.mmfs_attention import HAS_TRITON
from mm_interleaved.ops.scaled_rows import ScaledRows
from mm_interleaved.pretrained import load
from toyworld.draw import draw
from toyworld.scene import Attributes, Scene, SceneObject

from ..generation.test_text import prompts

installed = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
QUANTIZED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj")  # fmt: skip


@pytest.fixture(params=QUANTIZATIONS)
def quantized(request: pytest.FixtureRequest, model: MMInterleaved) -> MMInterleaved:
    mine = copy.deepcopy(model)
    quantize(mine, request.param)
    return mine


@installed
def test_matrices_of_decoder_layers_and_nothing_else(quantized: MMInterleaved, model: MMInterleaved) -> None:
    layers = len(model.language_model.layers)
    wanted = {f"language_model.layers.{i}.{name}.weight" for i in range(layers) for name in QUANTIZED}
    assert {name for name, p in quantized.named_parameters() if len(stored(p)) > 1} == wanted
    for name, parameter in model.named_parameters():
        if name not in wanted:
            assert torch.equal(parameter, quantized.get_parameter(name))


@installed
def test_weights_are_near_what_they_were(quantized: MMInterleaved, model: MMInterleaved) -> None:
    """A row's numbers are at most half a step off; a step of int8 is its largest number / 127."""
    for name in QUANTIZED:
        before = model.language_model.layers[0].get_submodule(name).weight
        linear = quantized.language_model.layers[0].get_submodule(name)
        known = readable(linear)
        if isinstance(known, ScaledRows) and known.data.dtype == torch.int8:
            off = (known.widened(torch.float32) - before).abs()
            assert (off <= 0.51 * before.abs().amax(1, keepdim=True) / 127 + 1e-9).all()
        x = torch.randn(5, before.shape[1], generator=torch.Generator().manual_seed(0))
        exact = nn.functional.linear(x, before)
        assert 0 < (linear(x) - exact).norm() / exact.norm() < (0.05 if isinstance(known, ScaledRows) else 0.15)
        bits = 8 * sum(t.numel() * t.element_size() for t in stored(linear.weight)) / before.numel()
        assert bits < (16 if isinstance(known, ScaledRows) else 7)  # scales are in float32 here, and rows short


@installed
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_bytes_are_known_before_loading(kind: Quantization) -> None:
    weight = torch.randn(64, 1024, dtype=torch.bfloat16)
    found = sum(t.numel() * t.element_size() for t in stored(store(weight, kind)))
    assert found == stored_bytes(64, 1024, 2, kind)


@installed
def test_what_reads_them_directly_gets_what_the_module_computes(quantized: MMInterleaved) -> None:
    linear = quantized.language_model.layers[0].mlp.up_proj
    x = torch.randn(3, linear.in_features)
    if readable(linear) is None:  # 4 bits: the module is called
        assert len(stored(linear.weight)) > 1
        return
    torch.testing.assert_close(x @ readable(linear).widened(torch.float32).T, linear(x), rtol=1e-5, atol=1e-6)
    assert readable(nn.Sequential()) is None


@installed
@pytest.mark.parametrize("beams", [1, 3])
def test_the_same_text_by_both_caches(quantized: MMInterleaved, processor: MMInterleavedProcessor, beams: int) -> None:
    found = []
    for kind in ("static", "dynamic"):
        settings = TextSettings(max_new_tokens=8, min_new_tokens=8, num_beams=beams, cache_implementation=kind)
        found.append([[t.ids for t in row] for row in quantized.generate_text(prompts(processor), settings)])
    assert found[0] == found[1]


@installed
@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="for Triton's interpreter")
def test_decoding_kernels_read_whole_numbers(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    mine = copy.deepcopy(model)
    quantize(mine, "int8")
    logits = []
    with torch.no_grad():
        for kernels in ("always", "never"):
            state = mine.prefill(prompts(processor), max_new_tokens=2)
            with decoding_kernels(kernels):
                for token in (30, 31):
                    found = state.decode_step(torch.full((3,), token), torch.ones(3, dtype=torch.bool))
            logits.append(found.clone())
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@installed
def test_another_model_for_whoever_compares_weights(model: MMInterleaved) -> None:
    digests = {weights_digest(model)}
    for kind in QUANTIZATIONS:
        mine = copy.deepcopy(model)
        quantize(mine, kind)
        digests.add(weights_digest(mine))
        again = copy.deepcopy(model)
        quantize(again, kind)
        assert weights_digest(again) == weights_digest(mine)
    assert len(digests) == 1 + len(QUANTIZATIONS)


@installed
def test_what_cannot_be(model: MMInterleaved, tmp_path: Path) -> None:
    mine = copy.deepcopy(model)
    quantize(mine, "int8")
    assert is_quantized(mine)
    assert not is_quantized(model)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(mine, "fp8")
    with pytest.raises(ValueError, match="keep the checkpoint"):
        mine.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@installed
def test_sizes_and_devices_that_int4_cannot_have(model: MMInterleaved) -> None:
    mine = copy.deepcopy(model)
    with pytest.raises(ValueError, match="on a CPU or a CUDA device, not on 'meta'; take nf4"):
        quantize(mine, "int4", "meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="float32; add --dtype bfloat16"):
            quantize(mine, "int4", "cuda")
    mine.language_model.layers[0].mlp.up_proj = nn.Linear(40, 8)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj is 8 x 40; take nf4 or int8"):
        quantize(mine, "int4")
    assert not is_quantized(mine)


def test_messages(model: MMInterleaved, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="one of int8, fp8, int4, nf4, not 'int3'"):
        quantize(model, "int3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(ValueError, match=r"needs torchao.*mm-interleaved\[quantization\]"):
        quantize(model, "int8")
    assert not is_quantized(model)


@installed
@pytest.mark.parametrize("kind", ["int8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int4", "nf4"))])
def test_the_shipped_model_answers_as_before(kind: Quantization) -> None:
    """Loaded by name; the name says how it is quantized."""
    plain, coarse = load("small"), load("small", quantization=kind)
    assert coarse.name == f"small ({kind})"
    scene = Scene((SceneObject(Attributes("fox", "red"), 4),))
    batch = coarse.processor([Document([Image(draw(scene, 128)), Text("a photo of")])])
    settings = TextSettings(max_new_tokens=10, num_beams=1)
    found = [loaded.model.generate_text(batch, settings)[0][0].ids for loaded in (plain, coarse)]
    if kind == "int8":
        assert found[0] == found[1]
    assert "red fox" in coarse.processor.decode_text(found[1])


@pytest.mark.parametrize("kind", ["int8", "nf4", "int4", "bnb-nf4"])
def test_gradients_pass_through_a_frozen_layer(kind: FrozenQuantization) -> None:
    """Those of its stored weight, which is near the exact one and has none itself."""
    pytest.importorskip("bitsandbytes" if kind == "bnb-nf4" else "torchao")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 8)).requires_grad_(False)
    exact, bias = model[0].weight.clone(), model[0].bias
    assert quantize_frozen(model, kind, ["0"]) == 1
    layer = model[0]
    assert isinstance(layer, QuantizedLinear)
    whole = (layer(torch.eye(128)) - bias).t()
    assert 0 < (whole - exact).norm() < (0.02 if kind == "int8" else 0.15) * exact.norm()
    x, grad = torch.randn(3, 5, 128, requires_grad=True), torch.randn(3, 5, 64)
    found = layer(x)
    found.backward(grad)
    assert torch.allclose(found, x @ whole.t() + bias, atol=1e-4)
    assert x.grad is not None
    assert torch.allclose(x.grad, grad @ whole, atol=1e-4)
    assert layer.weight.grad is None


def test_a_base_in_4_bits_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for kind, words in (("bnb-nf4", "needs bitsandbytes, .* pip install bitsandbytes"), ("int4", "needs torchao")):
        with pytest.raises(ValueError, match=words):
            quantize_frozen(nn.Sequential(nn.Linear(64, 64)), kind, ["0"])
