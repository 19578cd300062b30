"""The decoder layer's norm, attention and MLP against the library's modules, and what adapters change in them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mm_interleaved.model import MMInterleavedConfig
from mm_interleaved.model.decoder_layer import GatedMLP, MMFSDecoderLayer
from mm_interleaved.model.language_model import build_language_model
from mm_interleaved.model.rms_norm import RMSNorm

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
KINDS = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "attention_dropout": 0.0},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
}


def decoder(kind: str, implementation: str = "sdpa") -> PreTrainedModel:
    """A small decoder of the library with weights that all matter."""
    config = AutoConfig.for_model(kind.split()[0], **SIZES, **KINDS[kind])
    config._attn_implementation = implementation
    model = AutoModel.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


class Layer(nn.Module):
    """A layer of the library in our form, without MMFS; parameters keep their names behind `layer.`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = MMFSDecoderLayer(layer, None)
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        return self.layer(hidden_states, images=None, visible=None, **kwargs)


def ours(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose layers are ours."""
    model = copy.deepcopy(model)
    model.layers = nn.ModuleList([Layer(layer) for layer in model.layers])
    model.norm = RMSNorm.of(model.norm)
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_results_and_gradients_are_the_librarys(kind: str, implementation: str) -> None:
    theirs = decoder(kind, implementation)
    model = ours(theirs)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    for given in (None, mask):
        embeds = [torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
        found = [m(inputs_embeds=x, attention_mask=given, use_cache=False).last_hidden_state
                 for m, x in zip((theirs, model), embeds, strict=True)]  # fmt: skip
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
        for out in found:
            out.square().sum().backward()
        torch.testing.assert_close(embeds[1].grad, embeds[0].grad, rtol=1e-4, atol=1e-4)
    gradients = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        other = gradients[name.replace(".layer.", ".")].grad
        if other is not None:
            torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_caches_are_the_librarys(kind: str) -> None:
    theirs = decoder(kind)
    model, embeds = ours(theirs), torch.randn(1, 9, 32)
    caches = [DynamicCache(config=m.config) for m in (theirs, model)]
    for part in embeds.split([6, 1, 2], dim=1):
        found = [m(inputs_embeds=part, past_key_values=c, use_cache=True).last_hidden_state
                 for m, c in zip((theirs, model), caches, strict=True)]  # fmt: skip
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(b.keys, a.keys, rtol=1e-5, atol=1e-5)


def test_under_autocast() -> None:
    """Products are half, angles and norms float32, as in training: as close as the library is."""
    theirs = decoder("qwen3")
    embeds, found = torch.randn(1, 9, 32), []
    for model in (theirs, ours(theirs)):
        exact = model(inputs_embeds=embeds).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            half = model(inputs_embeds=embeds).last_hidden_state
        assert half.dtype == torch.float32
        found.append(float((half - exact).detach().norm() / exact.detach().norm()))
    assert found[1] < 1.2 * found[0] < 0.1


def test_other_activations_are_the_librarys() -> None:
    mlp = decoder("llama").layers[0].mlp
    mlp.config = copy.deepcopy(mlp.config)
    mlp.config.hidden_act, mlp.act_fn = "gelu", nn.GELU()
    x = torch.randn(2, 3, 32)
    assert torch.equal(GatedMLP(mlp)(x), mlp(x))


def test_lora_is_not_passed_by() -> None:
    peft = pytest.importorskip("peft")
    theirs = decoder("llama")
    config = peft.LoraConfig(target_modules=["q_proj", "gate_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.inject_adapter_in_model(config, copy.deepcopy(theirs))
    found = [m(inputs_embeds=torch.ones(1, 5, 32)).last_hidden_state for m in (adapted, ours(adapted), theirs)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[1], found[2], atol=1e-3)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm(kind: torch.dtype) -> None:
    """Rounded once, our norm is at least as close to the truth as the library's."""
    library = LlamaRMSNorm(256, 1e-5)
    library.weight.data.normal_(1, 0.3)
    exact = LlamaRMSNorm(256, 1e-5)
    x = 3 * torch.randn(4, 256)
    library, x = library.to(kind), x.to(kind)
    exact.weight.data.copy_(library.weight.data)
    norm, truth = RMSNorm.of(library), exact(x.float())
    assert norm.weight is library.weight
    errors = [float((n(x).float() - truth).detach().norm() / truth.detach().norm()) for n in (norm, library)]
    assert errors[0] <= max(errors[1] * 1.02, 1e-6)
    assert norm(x).dtype == kind
    if kind != torch.float32:  # half beside weights in float32: as the library has it
        wide = library.float()
        assert torch.equal(RMSNorm.of(wide)(x), wide(x))


def test_decoders_are_composed_with_our_norms_and_their_weights() -> None:
    config = MMInterleavedConfig.preset("debug")
    names = set(build_language_model(config).state_dict())
    assert {n for n in names if "synchronizer" not in n} == set(AutoModel.from_config(config.text_config).state_dict())
