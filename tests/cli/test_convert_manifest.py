"""`mmi convert` and back on a checkpoint that has every tensor of the released one: not one bit changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mm_interleaved.checkpoints import checkpoint
from mm_interleaved.checkpoints.checkpoint import expected_parameters, read_weights, weight_files
from mm_interleaved.checkpoints.original import NameTable, derived_tensors
from mm_interleaved.model import MMInterleavedConfig

from ..conftest import GOLDEN_DATA, golden_bytes
from .conftest import Outcome

Mmi = Callable[..., Outcome]
SPECIAL = {  # bits that arithmetic would change: -0.0, quiet and signalling NaNs with payloads, a subnormal number
    torch.float16: (torch.int16, [-0x8000, 0x7E2A, 0x7C01, -0x0155, 0x0001]),
    torch.float32: (torch.int32, [-0x80000000, 0x7FC12345, 0x7F800001, -0x00012345, 0x00000001]),
}


def narrow_release() -> MMInterleavedConfig:
    """The release with all its layers, each as narrow as it can be."""
    tree = MMInterleavedConfig.preset("release").to_dict()
    tree["text_config"] |= {
        "vocab_size": 34, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 4,
    }  # fmt: skip
    tree["vision_config"] |= {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "image_size": 56}
    tree["adapter"] |= {"stem_channels": 4, "num_heads": 2}
    narrow = {"num_queries": 4, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8}
    tree["visual_resampler"] |= narrow
    tree["mmfs"] |= {"hidden_size": 8, "levels": [8, 4, 2], "num_heads": 2, "num_points": 1, "base_size": 4}
    decoder = tree["image_decoder"]
    decoder["image_size"] = 64
    decoder["unet"] |= {
        "sample_size": 8, "block_out_channels": [8, 16, 24, 24], "attention_head_dim": [2, 2, 2, 2],
        "cross_attention_dim": 8, "norm_num_groups": 4,
    }  # fmt: skip
    decoder["vae"] |= {"block_out_channels": [4, 6, 8, 8], "norm_num_groups": 2, "sample_size": 64}
    decoder["resampler"] |= narrow
    decoder["mmfs"] |= {"hidden_size": 8, "levels": [16, 8, 4, 2], "num_heads": 2, "num_points": 1}
    ids = {"image_token_id": 32, "soi_token_id": 33}
    return MMInterleavedConfig.from_dict(tree | ids)


def random_bits(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A tensor of random bits, as any could stand in a file; its first values are those of `SPECIAL`."""
    kind, special = SPECIAL[dtype]
    size = torch.Size(shape).numel()
    bits = torch.randint(0, 256, (size * dtype.itemsize,), generator=generator, dtype=torch.uint8).view(kind)
    bits[: len(special)] = torch.tensor(special, dtype=kind)[:size]
    return bits.view(dtype).view(shape)


def original(config: MMInterleavedConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict as the original would have saved it, in the order of the release's."""
    generator, names = torch.Generator().manual_seed(4), NameTable(config)
    shapes = {names.theirs(name): shape for name, shape in expected_parameters(config).items()}
    tables = {name: compute() for name, compute in derived_tensors(config).items()}
    state = {}
    for name in json.loads(golden_bytes(GOLDEN_DATA / "manifest.json"))["tensors"]:
        if name in tables:
            state[name] = tables[name].to(dtype) if tables[name].is_floating_point() else tables[name]
        else:
            state[name] = random_bits(shapes[name], dtype, generator)
    return state


@pytest.mark.parametrize("dtype", list(SPECIAL), ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_tensor_of_the_release_there_and_back(
    mmi: Mmi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 200_000)  # several files, as the release has
    config = narrow_release()
    state = original(config, dtype)
    manifest = json.loads(golden_bytes(GOLDEN_DATA / "manifest.json"))["tensors"]
    assert state.keys() == manifest.keys()
    assert len(state) == 2659
    assert all(tensor.dim() == len(manifest[name]["shape"]) for name, tensor in state.items())
    (tmp_path / "original").mkdir()
    keys = list(state)
    for i in range(3):
        part = {name: state[name] for name in keys[i::3]}
        torch.save(part, tmp_path / "original" / f"pytorch_model-{i + 1:05d}-of-00003.bin")
    config.save_pretrained(tmp_path / "config")
    there = mmi("convert", tmp_path / "original", tmp_path / "ours", "--config", tmp_path / "config")
    assert there.code == 0, there.err
    back = mmi("convert", tmp_path / "ours", tmp_path / "back", "--to-original")
    assert back.code == 0, back.err
    found: dict[str, Tensor] = {}
    files = weight_files(tmp_path / "back")
    assert len(files) > 1
    for path in files:
        found |= read_weights(path)
    assert found.keys() == state.keys()
    different = [name for name, tensor in state.items() if not _same_bits(tensor, found[name])]
    assert not different


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in type, shape and every bit; NaNs too."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
