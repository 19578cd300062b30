"""What training starts from (docs/model.md, "MMFS" and "Directions of the adapter's offsets")."""

from __future__ import annotations

import math

import pytest
import torch

from mm_interleaved import MMInterleaved, MMInterleavedConfig


@pytest.fixture(scope="module")
def fresh() -> MMInterleaved:
    torch.manual_seed(0)
    return MMInterleaved(MMInterleavedConfig.preset("small"))


def deviation(x: torch.Tensor) -> float:
    return float(x.detach().std())


def test_synchronizers_of_the_decoder(fresh: MMInterleaved) -> None:
    """The library's generic initialisation does not reach them."""
    synchronizer = fresh.language_model.layers[4].synchronizer
    mmfs = synchronizer.mmfs
    assert synchronizer.gate.item() == 0
    assert deviation(mmfs.dynamic_offset_mask.weight) == pytest.approx(0.02, rel=0.1)
    assert deviation(mmfs.attention_weights.weight) == pytest.approx(0.02, rel=0.1)
    assert not mmfs.sampling_offsets.weight.any()
    assert 2.5 < mmfs.sampling_offsets.bias.abs().max() <= 3
    assert deviation(mmfs.query_relpos.weight) == pytest.approx(0.02, rel=0.1)
    assert deviation(mmfs.value_proj.weight) == pytest.approx(math.sqrt(2 / (128 + 128)), rel=0.1)  # Xavier
    assert not mmfs.ignore_token.any()


def test_synchronizers_of_the_image_decoder(fresh: MMInterleaved) -> None:
    mmfs = fresh.image_decoder.unet.synchronizers[-1].mmfs
    assert 0.7 < mmfs.sampling_offsets.bias.abs().max() <= 1
    bound = mmfs.dynamic_offset_mask.in_features**-0.5
    assert 0.9 * bound < mmfs.dynamic_offset_mask.weight.abs().max() <= bound
    assert not mmfs.ignore_token.requires_grad


def test_adapter_heads_look_in_their_own_directions(fresh: MMInterleaved) -> None:
    """The original lost these directions, so that the points of a head never separate."""
    attention = fresh.visual_tokenizer.encoder.interactions[0].injector.attention
    bias = attention.sampling_offsets.bias.detach().view(attention.heads, attention.levels, attention.points, 2)
    assert (
        len({tuple(p) for p in bias[:, 0].reshape(-1, 2).round(decimals=3).tolist()})
        == attention.heads * attention.points
    )
    torch.testing.assert_close(bias[:, :, 1], 2 * bias[:, :, 0])
    assert not attention.sampling_offsets.weight.any()


def test_adapter_starts_as_plain_clip(fresh: MMInterleaved) -> None:
    assert not any(i.injector.gamma.any() for i in fresh.visual_tokenizer.encoder.interactions)


def test_images_enter_quietly(fresh: MMInterleaved) -> None:
    assert deviation(fresh.visual_tokenizer.proj.weight) == pytest.approx(1e-3, rel=0.1)
    wanted = fresh.config.visual_resampler.initializer_range
    assert deviation(fresh.visual_tokenizer.resampler.queries) == pytest.approx(wanted, rel=0.1)
    assert MMInterleavedConfig.preset("release").visual_resampler.initializer_range == 0.02


def test_library_parts_keep_the_library_initialisation(fresh: MMInterleaved) -> None:
    config = fresh.config.text_config
    assert deviation(fresh.language_model.layers[0].mlp.up_proj.weight) == pytest.approx(
        config.initializer_range, rel=0.1
    )
    clip = fresh.visual_tokenizer.encoder
    assert deviation(clip.embeddings.patch_embedding.weight) == pytest.approx(0.02, rel=0.1)
    conv = fresh.image_decoder.unet.down_blocks[0].resnets[0].conv1.weight
    assert float(conv.abs().max()) <= (conv.shape[1] * 9) ** -0.5
