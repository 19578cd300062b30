"""What must be as in the original for its weights to work: one test for each section of docs/model.md, "Quirks kept".

Several are also held numerically by the golden cases; here each behaviour is visible by itself.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mm_interleaved import (
    Document,
    Image,
    ImageSettings,
    MMInterleaved,
    MMInterleavedConfig,
    MMInterleavedProcessor,
    Text,
)
from mm_interleaved.model.config import ResamplerConfig
from mm_interleaved.model.layout import find_images, previous_images, visible_images
from mm_interleaved.model.mmfs import VisibleImages, mmfs_reference
from mm_interleaved.model.positions import sincos_1d
from mm_interleaved.model.resampler import ResamplerAttention
from mm_interleaved.model.schedulers import find_scheduler
from mm_interleaved.model.vit_adapter import ChannelNorm
from mm_interleaved.processor import IMAGE_TOKEN, SOI_TOKEN, build_labels

from ..conftest import make_image


@pytest.fixture(scope="module")
def release() -> MMInterleaved:
    with torch.device("meta"):
        return MMInterleaved(MMInterleavedConfig.preset("release"))


def test_the_learned_ignore_logits_are_dead(model: MMInterleaved) -> None:
    mmfs = copy.deepcopy(model.language_model.layers[0].synchronizer.mmfs)
    config, shapes = mmfs.config, [(s, s) for s in mmfs.config.levels]
    values = torch.randn(2, sum(h * w for h, w in shapes), config.num_heads, config.hidden_size // config.num_heads)
    query, visible = torch.randn(1, 1, 32), VisibleImages.build(torch.tensor([[1, 0]]), 2)
    arguments = (values, visible, shapes, torch.full((1, 1, 2), 0.5), 4)
    before = mmfs(query, *arguments)
    with torch.no_grad():
        mmfs.attention_weights.bias.unflatten(0, (-1, config.num_points + 1))[:, -1] += 100
        mmfs.query_relpos.weight[0] += 100
    assert torch.equal(mmfs(query, *arguments), before)
    mask = torch.ones(1, 1, 2)
    _, _, weights = mmfs_reference(mmfs, query, values[None], mask, shapes, torch.full((1, 1, 2), 0.5), 4)
    assert (weights.flatten(3).sum(-1) < 1).all()  # the rest is the constant slots' share


def test_a_query_that_sees_nothing_gets_the_output_bias(model: MMInterleaved) -> None:
    synchronizer = copy.deepcopy(model.language_model.layers[0].synchronizer)
    nn.init.zeros_(synchronizer.mmfs.ignore_token)
    hidden, nothing = torch.randn(1, 3, 32), VisibleImages.build(torch.zeros(3, 0, dtype=torch.long), 0)
    seen = synchronizer(hidden, model.no_images(), nothing) - hidden
    expected = synchronizer.gate.tanh() * synchronizer.mmfs.output_proj.bias
    torch.testing.assert_close(seen, expected.expand(1, 3, -1))
    assert expected.any()


def test_the_image_decoder_sees_one_previous_image(release: MMInterleaved) -> None:
    assert release.config.image_decoder.previous_images == 1
    ids = torch.tensor([[1, 2, 2, 2]])
    assert previous_images(find_images(ids, torch.ones_like(ids), 2, None), 1).tolist() == [[-1], [0], [1]]


def test_the_unconditional_half_sees_the_images() -> None:
    assert ImageSettings().unconditional_sees_images  # what it does: test_image_decoder.py


def test_context_is_reversed_and_counted_from_the_image(model: MMInterleaved) -> None:
    ids = torch.tensor([[1, 9, 9, model.config.soi_token_id]])
    hidden = torch.randn(1, 4, 32)
    positions = find_images(ids, torch.ones_like(ids), model.config.soi_token_id, None)
    context, mask = model.image_context(hidden, positions)
    table = torch.from_numpy(sincos_1d(torch.arange(4).numpy(), 32))
    torch.testing.assert_close(context[0], model.context_proj(hidden[0].flip(0)) + table)
    assert mask.tolist() == [[1, 1, 1, 1]]


def test_synchronizers_start_as_nothing(debug_config: MMInterleavedConfig) -> None:
    fresh = MMInterleaved(debug_config)
    for synchronizer in fresh.image_decoder.unet.synchronizers:  # their place: test_unet.py
        assert not synchronizer.conv.weight.any()
        assert not synchronizer.conv.bias.any()


def test_norms(release: MMInterleaved) -> None:
    encoder = release.visual_tokenizer.encoder
    names = [n for n, _ in encoder.named_parameters()]
    assert not any("post_layernorm" in n for n in names)  # CLIP's last norm is absent
    adapter = [m for m in encoder.interactions.modules() if isinstance(m, nn.LayerNorm)]
    assert {m.eps for m in adapter} == {1e-5}
    assert {m.eps for m in encoder.modules() if isinstance(m, ChannelNorm)} == {1e-6}
    assert {release.visual_tokenizer.pos_norm.eps, release.visual_tokenizer.post_norm.eps} == {1e-6}
    unet = release.image_decoder.unet.synchronizers
    assert {m.eps for s in unet for m in (s.query_norm, s.feature_norm)} == {1e-6}
    for resampler in (release.visual_tokenizer.resampler, release.image_decoder.resampler):
        assert {m.eps for m in resampler.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}


def test_the_image_resampler_has_a_wide_mlp(release: MMInterleaved) -> None:
    layer = release.image_decoder.resampler.layers[0]
    assert (layer.fc1.in_features, layer.fc1.out_features) == (1024, 3072)


def test_the_begin_of_image_embedding_and_head(debug_config: MMInterleavedConfig) -> None:
    torch.manual_seed(0)
    fresh = MMInterleaved(debug_config)
    soi = debug_config.soi_token_id
    with torch.no_grad():
        fresh.soi_token.weight.fill_(2.0)
        embedded = fresh.embed(torch.tensor([[5, soi]]), None)
        row = fresh.language_model.embed_tokens.weight
        torch.testing.assert_close(embedded[0, 1], row[soi] + 2)
        torch.testing.assert_close(embedded[0, 0], row[5])
        logits = fresh.lm_head(torch.zeros(1, 32))
    assert logits[0, -2:].tolist() == [-5.0, -5.0]  # -100 in the frozen head, +95 in the trained rows
    assert not logits[0, :-2].any()


def test_tokenisation_and_padding(processor: MMInterleavedProcessor) -> None:
    batch = processor(Document([Text("a "), Image(make_image()), Text(" b")]))
    assert processor.tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist()) == [
        "<s>", "▁a", SOI_TOKEN, *[IMAGE_TOKEN] * 4, "▁b",
    ]  # fmt: skip
    ids, mask = torch.tensor([[1, 50, 0, 0]]), torch.tensor([[1, 1, 1, 0]])  # 0 pads, and occurs
    labels = build_labels(ids, mask, bos_token_id=1, soi_token_id=7, image_token_id=8)
    assert labels.tolist() == [[-100, 50, 0, -100]]


def test_packed_documents_see_each_other_in_attention_only(release: MMInterleaved) -> None:
    assert release.config.isolate_documents is False  # what it does: test_model.py
    ids = torch.tensor([[1, 2, 3, 1, 2, 3]])
    assert visible_images(ids, torch.ones_like(ids), 1, 2)[0, -1].tolist() == [1]


def test_ancestral_sampling_with_leading_spacing(release: MMInterleaved) -> None:
    assert ImageSettings().scheduler == "DDPMScheduler"
    scheduler = find_scheduler("DDPMScheduler").from_config(release.config.image_decoder.scheduler)
    config = scheduler.config
    assert (config.variance_type, config.timestep_spacing, config.steps_offset) == ("fixed_small", "leading", 1)
    assert not config.clip_sample
    assert config.prediction_type == "epsilon"


def test_query_and_key_norms_are_shared_by_the_heads() -> None:
    config = ResamplerConfig(num_queries=2, hidden_size=16, num_layers=1, num_heads=4, qk_norm=True)
    attention = ResamplerAttention(config, 16)
    assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (4,)
    x = torch.randn(1, 2, 16)
    q = attention.q_norm(attention.q_proj(x).unflatten(-1, (4, 4)).transpose(1, 2))
    k = attention.k_norm(attention.k_proj(x).unflatten(-1, (4, 4)).transpose(1, 2))
    v = attention.v_proj(x).unflatten(-1, (4, 4)).transpose(1, 2)  # values are not normalised
    mixed = (q @ k.transpose(-1, -2) / math.sqrt(4)).softmax(-1) @ v
    expected = attention.norm(x + attention.out_proj(mixed.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(attention(x, x), expected)


def test_the_class_token_is_resampled_without_a_position(model: MMInterleaved) -> None:
    tokenizer = model.visual_tokenizer
    entered = []
    hook = tokenizer.resampler.register_forward_hook(lambda _m, inputs, _o: entered.append(inputs[0]))
    with torch.no_grad():
        features = tokenizer(torch.rand(1, 3, 56, 56))
        hook.remove()
        assert entered[0].shape[1] == 1 + 16
        normed = tokenizer.pos_norm(tokenizer.pos_proj(features.last_hidden_state))
        torch.testing.assert_close(entered[0][:, 0], tokenizer.post_norm(normed[:, 0]))
        torch.testing.assert_close(entered[0][:, 1:], tokenizer.post_norm(normed[:, 1:] + tokenizer.grid_positions()))


def test_the_announcement_does_not_see_its_image() -> None:
    ids = torch.tensor([[1, 2, 3, 3]])
    assert visible_images(ids, torch.ones_like(ids), 1, 2)[0].tolist() == [[-1], [-1], [0], [0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_casts_before_the_gain(model: MMInterleaved, dtype: torch.dtype) -> None:
    norm = copy.deepcopy(model.language_model.layers[0].synchronizer.query_norm)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(32) + 0.5)
    norm.to(dtype)
    x = torch.randn(4, 32).to(dtype)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    assert torch.equal(norm(x), norm.weight * normed.to(dtype))
