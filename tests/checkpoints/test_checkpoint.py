"""Conversion from the original and back: streaming, complete, and nothing half-written."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mm_interleaved import MMInterleaved, MMInterleavedConfig
from mm_interleaved.checkpoints import checkpoint
from mm_interleaved.checkpoints.checkpoint import (
    CheckpointError,
    convert_from_original,
    convert_to_original,
    read_weights,
    upscale,
    weight_files,
)
from mm_interleaved.checkpoints.original import NameTable, derived_tensors
from mm_interleaved.io import OutputError


@pytest.fixture(scope="module")
def original(model: MMInterleaved) -> dict[str, Tensor]:
    """The shared model as the original would have saved it."""
    names = NameTable(model.config)
    state = {names.theirs(n): p.detach().clone() for n, p in model.named_parameters()}
    return state | {name: compute() for name, compute in derived_tensors(model.config).items()}


def save_original(state: dict[str, Tensor], folder: Path, shards: int = 2) -> Path:
    folder.mkdir()
    names = list(state)
    for i in range(shards):
        part = {n: state[n] for n in names[i::shards]}
        torch.save(part, folder / f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_there_and_back_is_bit_equal(
    original: dict[str, Tensor], model: MMInterleaved, tmp_path: Path, dtype: torch.dtype, monkeypatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1_000_000)  # several shards
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in original.items()}
    source = save_original(state, tmp_path / "original")
    (source / "training_args.bin").write_bytes(b"not weights, and not read")
    (source / "notes.txt").write_text("ignored")
    convert_from_original(source, tmp_path / "ours", model.config)
    assert len(weight_files(tmp_path / "ours")) > 1
    ours = MMInterleaved.from_pretrained(tmp_path / "ours")
    assert ours.dtype == dtype
    for (name, a), b in zip(ours.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.to(dtype).to(a.dtype)), name
    convert_to_original(tmp_path / "ours", tmp_path / "back")
    back: dict[str, Tensor] = {}
    for path in weight_files(tmp_path / "back"):
        back |= read_weights(path)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_the_type_can_be_chosen(original: dict[str, Tensor], model: MMInterleaved, tmp_path: Path) -> None:
    source = save_original(original, tmp_path / "original")
    written = convert_from_original(source, tmp_path / "ours", model.config, torch.bfloat16)
    assert written.dtype == torch.bfloat16
    weights = read_weights(weight_files(tmp_path / "ours")[0])
    assert {t.dtype for n, t in weights.items() if not n.startswith("image_decoder.vae.")} == {torch.bfloat16}
    assert {t.dtype for n, t in weights.items() if n.startswith("image_decoder.vae.")} == {torch.float32}
    assert MMInterleaved.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16


def test_one_file_and_a_wrapped_dictionary(original: dict[str, Tensor], model: MMInterleaved, tmp_path: Path) -> None:
    torch.save({"state_dict": original}, tmp_path / "model.pt")
    convert_from_original(tmp_path / "model.pt", tmp_path / "ours", model.config)
    assert MMInterleaved.from_pretrained(tmp_path / "ours").config.to_dict()["mmfs"] == model.config.to_dict()["mmfs"]


def test_old_pickles_can_be_read(original: dict[str, Tensor], model: MMInterleaved, tmp_path: Path) -> None:
    torch.save(original, tmp_path / "model.bin", _use_new_zipfile_serialization=False)
    convert_from_original(tmp_path / "model.bin", tmp_path / "ours", model.config)


# ---- refused, with nothing written


def refused(source: Path, config: MMInterleavedConfig, target: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert_from_original(source, target, config)
    assert not target.exists()
    assert not list(target.parent.glob("*.incomplete"))
    return str(caught.value)


def test_missing_unexpected_and_misshaped_keys(
    original: dict[str, Tensor], model: MMInterleaved, tmp_path: Path
) -> None:
    state = dict(original)
    del state["context_feat_proj.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["soi_token"] = torch.zeros(1, 7)
    message = refused(save_original(state, tmp_path / "original"), model.config, tmp_path / "ours")
    assert "1 missing: context_feat_proj.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "soi_token [1, 7] instead of [1, 32]" in message
    assert "Nothing was written" in message


def test_another_size(original: dict[str, Tensor], tmp_path: Path) -> None:
    source = save_original(original, tmp_path / "original")
    message = refused(source, MMInterleavedConfig.preset("small"), tmp_path / "ours")
    assert "of another shape" in message


def test_another_position_table(original: dict[str, Tensor], model: MMInterleaved, tmp_path: Path) -> None:
    state = original | {"visual_tokenizer.pos_embed": original["visual_tokenizer.pos_embed"] + 0.1}
    message = refused(save_original(state, tmp_path / "original"), model.config, tmp_path / "ours")
    assert "1 unlike the table that follows from the configuration: visual_tokenizer.pos_embed" in message


def test_a_key_in_two_files(original: dict[str, Tensor], model: MMInterleaved, tmp_path: Path) -> None:
    source = save_original(original, tmp_path / "original")
    torch.save({"soi_token": original["soi_token"]}, source / "pytorch_model-extra.bin")
    assert "soi_token (twice)" in refused(source, model.config, tmp_path / "ours")


def test_a_missing_shard(original: dict[str, Tensor], model: MMInterleaved, tmp_path: Path) -> None:
    source = save_original(original, tmp_path / "original")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "extra.bin", "c": "other.safetensors"}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "lacks extra.bin;" in refused(source, model.config, tmp_path / "ours")
    (source / "pytorch_model.bin.index.json").write_text("[]")
    assert "not an index" in refused(source, model.config, tmp_path / "ours")
    (source / "pytorch_model.bin.index.json").unlink()
    (source / "pytorch_model-00001-of-00002.bin").unlink()
    assert "lacks pytorch_model-00001-of-00002.bin;" in refused(source, model.config, tmp_path / "ours")


class Trap:
    """A pickle that would run code."""

    def __reduce__(self):
        return (sys.modules["os"].system, ("touch /tmp/trapped",))


def test_a_pickle_with_code_in_it(model: MMInterleaved, tmp_path: Path) -> None:
    source = tmp_path / "original"
    source.mkdir()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"soi_token": Trap()}))
    assert "is refused, because it holds more than tensors" in refused(source, model.config, tmp_path / "ours")
    torch.save({"soi_token": Trap()}, source / "pytorch_model.bin")
    assert "is refused, because it holds more than tensors" in refused(source, model.config, tmp_path / "ours")
    assert not Path("/tmp/trapped").exists()


def test_a_truncated_file(original: dict[str, Tensor], model: MMInterleaved, tmp_path: Path) -> None:
    source = save_original(original, tmp_path / "original")
    path = next(iter(source.glob("*.bin")))
    path.write_bytes(path.read_bytes()[:-1000])
    assert "is damaged" in refused(source, model.config, tmp_path / "ours")


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_a_file_that_is_no_checkpoint(model: MMInterleaved, tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "original"
    source.mkdir()
    (source / "pytorch_model.bin").write_bytes(content)
    message = refused(source, model.config, tmp_path / "ours")
    assert "pytorch_model.bin" in message


def test_nothing_there(model: MMInterleaved, tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "gone", model.config, tmp_path / "ours")
    (tmp_path / "empty").mkdir()
    assert "holds no .safetensors, .bin or .pt file" in refused(tmp_path / "empty", model.config, tmp_path / "ours")


def test_the_target_must_be_new(original: dict[str, Tensor], model: MMInterleaved, tmp_path: Path) -> None:
    source = save_original(original, tmp_path / "original")
    with pytest.raises(OutputError, match="exists already"):
        convert_from_original(source, source, model.config)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        convert_from_original(source, tmp_path / "file" / "ours", model.config)


# ---- ours


def test_an_incomplete_checkpoint_of_ours(model: MMInterleaved, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    shards = weight_files(tmp_path)
    assert len(shards) > 1
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    dropped = [n for n, f in names["weight_map"].items() if f == shards[0].name]
    names["weight_map"] = {n: f for n, f in names["weight_map"].items() if n not in dropped}
    index.write_text(json.dumps(names))
    with pytest.raises(ValueError, match=f"{len(dropped)} missing weights"):
        MMInterleaved.from_pretrained(tmp_path)


def test_pickles_are_not_loaded_as_ours(model: MMInterleaved, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        MMInterleaved.from_pretrained(tmp_path)


# ---- larger images


def test_image_upscale(original: dict[str, Tensor], model: MMInterleaved, tmp_path: Path) -> None:
    source = save_original(original, tmp_path / "original")
    written = convert_from_original(source, tmp_path / "ours", model.config, image_upscale=1.5)
    assert (written.grid_size, written.vision_config.image_size) == (6, 84)
    assert written.mmfs.levels == [12, 6, 3]
    assert written.mmfs.base_size == model.config.mmfs.base_size  # offsets keep their meaning
    wider = MMInterleaved.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    features = wider.encode_images(torch.rand(1, 3, 84, 84))
    assert [m.shape[-1] for m in features.pyramid] == [24, 12, 6, 3]
    old = model.visual_tokenizer.encoder.embeddings.position_embedding.weight
    new = wider.visual_tokenizer.encoder.embeddings.position_embedding.weight
    assert torch.equal(new[0], old[0])
    grid = torch.nn.functional.interpolate(
        old[1:].T.view(1, -1, 4, 4), size=(6, 6), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(new[1:], grid.flatten(2)[0].T)


def test_upscaling_by_one_changes_nothing(model: MMInterleaved) -> None:
    assert upscale(model.config, 1.0).to_dict() == model.config.to_dict()


def test_frozen_parts_stay_frozen_after_loading(model: MMInterleaved, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = MMInterleaved.from_pretrained(tmp_path)
    expected = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == expected
    assert any(name.startswith("image_decoder.vae.") for name in expected)
