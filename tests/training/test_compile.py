"""Compiled layers compute what written ones do, as far as a CPU compiles quickly: traced, then run step by step."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from mm_interleaved import MMInterleaved
from mm_interleaved.model import decoder_layer
from mm_interleaved.model.language_model import MMFSDecoderLayer
from mm_interleaved.ops.mmfs_attention import HAS_TRITON
from mm_interleaved.training.checkpointing import enable_checkpointing
from mm_interleaved.training.run import compile_regions


@pytest.mark.slow
@pytest.mark.parametrize("selective", [False, True], ids=["all anew", "some kept"])
@pytest.mark.parametrize(
    "backend", ["plain", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason=""))]
)
def test_decoder_layers_with_checkpointing(
    model: MMInterleaved, monkeypatch: pytest.MonkeyPatch, backend: str, selective: bool
) -> None:
    """No graph breaks, two kinds of layers compiled, the same loss and gradients."""
    for name in ("rotary", "silu_gate"):
        call = getattr(decoder_layer, name)
        monkeypatch.setattr(decoder_layer, name, lambda *args, call=call: call(*args, backend))
    config = model.config
    image = [config.soi_token_id] + [config.image_token_id] * config.num_image_tokens
    ids = torch.tensor([[config.bos_token_id, 5, 6, *image, 7, 8, 9]])
    side = config.vision_config.image_size
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for compiled in (False, True):
        trained = copy.deepcopy(model).train()
        enable_checkpointing(trained, selective)
        if compiled:
            compile_regions(trained, "decoder", "aot_eager")
        loss = trained(ids, pixel_values=pixels, labels=ids).loss_txt
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in trained.language_model.parameters() if p.grad is not None)])
    assert torch._dynamo.utils.counters["graph_break"] == {}
    kinds = {layer.synchronizer is None for layer in model.language_model.layers}
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= len(kinds)
    for compiled, written in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(compiled, written, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_which_blocks_are_compiled(model: MMInterleaved) -> None:
    compiled = {}
    for which in ("none", "decoder", "regional"):
        trained = copy.deepcopy(model)
        compile_regions(trained, which, "eager")
        compiled[which] = [m for m in trained.modules() if m._compiled_call_impl is not None]
    assert compiled["none"] == []
    assert len(compiled["decoder"]) == len(model.language_model.layers)
    assert all(isinstance(m, MMFSDecoderLayer) for m in compiled["decoder"])
    assert len(compiled["regional"]) > len(compiled["decoder"])


def test_nothing_to_compile_is_an_error(model: MMInterleaved) -> None:
    with pytest.raises(ValueError, match=re.escape("compile: decoder finds nothing to compile")):
        compile_regions(model.image_decoder.vae, "decoder")
