"""The configuration tree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from mm_interleaved.model import MMInterleavedConfig, MMInterleavedModel
from mm_interleaved.model.config import PRESETS, _debug


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_saving(name: str, tmp_path: Path) -> None:
    config = MMInterleavedConfig.preset(name)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, MMInterleavedConfig)
    where_from = {"_name_or_path": ""}
    assert again.to_dict() | where_from == config.to_dict() | where_from


def test_small_is_small() -> None:
    with torch.device("meta"):
        model = MMInterleavedModel(MMInterleavedConfig.preset("small"))
    count = sum(p.numel() for p in model.parameters())
    assert 12e6 <= count <= 16e6
    assert model.config.image_decoder.image_size == 128


def change(path: str, value: object) -> dict:
    tree = _debug()
    *parents, last = path.split(".")
    branch = tree
    for key in parents:
        branch = branch[key]
    branch[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("text_config.model_type", "gpt2", "'gpt2' is not one of llama, mistral, qwen2, qwen3"),
        ("vision_config.image_size", 60, "multiple of patch_size"),
        ("vision_config.image_size", 42, "even side, not 3"),
        ("vision_config.num_hidden_layers", 6, "multiple of 4"),
        ("mmfs.levels", [8, 3], "[8, 3] are not among the image's maps [16, 8, 4, 2]"),
        ("mmfs.hidden_size", 18, "18 is not a multiple of num_heads 4"),
        ("mmfs.num_hedas", 4, "unknown key 'num_hedas' in mmfs (model configuration). Did you mean 'num_heads'?"),
        ("image_decoder.image_size", 24, "cannot halve evenly"),
        ("image_decoder.resampler.hidden_size", 64, "must equal the UNet's cross_attention_dim 32"),
        ("image_decoder.mmfs.levels", [16, 8], "must be all the image's maps"),
        ("image_decoder.previous_images", 10, "must be smaller than"),
        ("mmfs.num_points", 2.5, "mmfs.num_points must be a whole number, not 2.5 (model configuration)"),
        ("image_decoder.guidance_scale", float("nan"), "image_decoder.guidance_scale must be a finite number"),
        ("image_decoder.resampler.num_heads", 0, "image_decoder.resampler.num_heads must be at least 1, not 0"),
        ("mmfs_implementation", "magic", "'fast' or 'reference'"),
        ("soi_token_id", 9999, "outside the vocabulary of 2050"),
        ("mmfs_every", "two", "mmfs_every must be a whole number, not 'two' (model configuration)"),
        ("mmfs_evry", 2, "unknown key 'mmfs_evry'. Did you mean 'mmfs_every'?"),
        ("model_type", "llama", "model_type is 'llama', but this model's is 'mm_interleaved'"),
        ("text_config.hidden_size", "big", "text_config: Field 'hidden_size' expected int, got str (value: 'big')"),
        ("text_config.hidden_size", 33, "text_config: The hidden size (33) is not a multiple"),
        ("adapter", 7, "adapter must be a mapping, not 7 (model configuration)"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_named(path: str, value: object, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        MMInterleavedConfig(**change(path, value))
    assert words in str(caught.value)


def test_missing_key_is_named() -> None:
    tree = _debug()
    del tree["visual_resampler"]["num_layers"]
    with pytest.raises(ValueError, match=r"visual_resampler\.num_layers must be given \(model configuration\)"):
        MMInterleavedConfig(**tree)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="no preset 'tiny'; there are release, small, debug"):
        MMInterleavedConfig.preset("tiny")


def test_further_keys_of_transformers_are_taken(tmp_path: Path) -> None:
    further = {"use_cache": False, "sep_token_id": 2, "torch_dtype": "float32", "auto_map": {}}
    MMInterleavedConfig(**(_debug() | further)).save_pretrained(tmp_path)
    assert MMInterleavedConfig.from_pretrained(tmp_path).sep_token_id == 2
