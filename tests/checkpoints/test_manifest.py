"""The released checkpoint's names, shapes, trainable flags and counts."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from mm_interleaved.checkpoints.original import NameTable, derived_tensors
from mm_interleaved.model import MMInterleavedConfig, MMInterleavedModel

from ..conftest import GOLDEN_DATA, golden_bytes


@cache
def manifest() -> dict[str, Any]:
    return json.loads(golden_bytes(GOLDEN_DATA / "manifest.json"))


@cache
def release() -> MMInterleavedModel:
    with torch.device("meta"):
        return MMInterleavedModel(MMInterleavedConfig.preset("release"))


def test_manifest_names_shapes_and_trainable_flags() -> None:
    names, derived = NameTable(release().config), derived_tensors(release().config)
    ours = {
        names.theirs(n): {"shape": list(p.shape), "requires_grad": p.requires_grad}
        for n, p in release().named_parameters()
    }
    for name, compute in derived.items():
        ours[name] = {"shape": list(compute().shape), "requires_grad": False}
    theirs = {n: {"shape": t["shape"], "requires_grad": t["requires_grad"]} for n, t in manifest()["tensors"].items()}
    assert ours == theirs


def test_names_translate_both_ways() -> None:
    names = NameTable(release().config)
    for name, _ in release().named_parameters():
        assert names.ours(names.theirs(name)) == name
    assert names.ours("optimizer.state") is None
    assert names.theirs("something.else") is None


# Our parts and the original's tables in them, which are no parameters here.
TABLES = {"visual_tokenizer": 257 * 1024, "image_decoder": 4096 * (4 * 320 + 3 * 640 + 6 * 1280)}


@pytest.mark.parametrize(
    ("part", "total", "trainable"),
    [
        ("visual_tokenizer", 433_312_960, 129_872_064),
        ("language_model", 13_215_069_930, 363_035_370),
        ("lm_head", 163_892_484, 10_242),
        ("image_decoder", 1_074_365_547, 946_133_892),
        ("context_proj", 26_219_520, 26_219_520),
        ("soi_token", 5_120, 5_120),
    ],
)
def test_manifest_counts(part: str, total: int, trainable: int) -> None:
    parameters = list(getattr(release(), part).parameters())
    assert sum(p.numel() for p in parameters) + TABLES.get(part, 0) == total
    assert sum(p.numel() for p in parameters if p.requires_grad) == trainable


def test_counts_of_smaller_parts() -> None:
    def count(module: torch.nn.Module, trainable: bool = False) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)

    model = release()
    encoder = model.visual_tokenizer.encoder
    clip = sum(count(m) for m in (encoder.embeddings, encoder.pre_layernorm, encoder.layers))
    assert clip == 303_177_728
    assert count(encoder) - clip == 23_228_608
    assert count(model.visual_tokenizer.resampler) == 101_652_480
    assert count(model.language_model.layers[0].synchronizer) == 36_303_537
    assert count(model.language_model.layers[1]) == 317_204_480
    assert count(model.image_decoder.resampler) == 23_168_000
    assert count(model.image_decoder.vae) == 83_653_863
    synchronizers = model.image_decoder.unet.synchronizers
    assert count(model.image_decoder.unet) - count(synchronizers) == 865_910_724
    assert count(synchronizers) + TABLES["image_decoder"] == 101_554_112
    assert [count(synchronizers[i], True) for i in (0, 4, 12)] == [1_856_000, 3_069_120, 6_724_160]


OPTIMISER_GROUPS = [
    ("llama_cross_attn.gate", 10),
    ("sampling_offsets", 18_259_968),
    ("llama_cross_attn", 349_925_600),
    ("image_decoder.decoder.unet", 865_910_724),
    ("", 231_179_906),
]


def test_trainable_parameters_fall_into_the_release_optimiser_groups() -> None:
    """Spec/model 7.2: the first group whose substring fits."""
    names, counts = NameTable(release().config), dict.fromkeys([g for g, _ in OPTIMISER_GROUPS], 0)
    for name, parameter in release().named_parameters():
        if parameter.requires_grad:
            group = next(g for g, _ in OPTIMISER_GROUPS if g in names.theirs(name))
            counts[group] += parameter.numel()
    assert list(counts.items()) == OPTIMISER_GROUPS
