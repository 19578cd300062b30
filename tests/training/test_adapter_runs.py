"""Runs that train an adapter: what is trained, saved, resumed and refused."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mm_interleaved.adapters.folder import read_adapter
from mm_interleaved.checkpoints.digest import weights_digest
from mm_interleaved.checkpoints.quantization import QuantizedLinear
from mm_interleaved.io import InputError
from mm_interleaved.model.weights import stored
from mm_interleaved.pretrained import TOKENIZER, load
from mm_interleaved.training.building import build
from mm_interleaved.training.checkpoints import list_checkpoints
from mm_interleaved.training.optimizer import parameter_groups
from mm_interleaved.training.run import train

from .conftest import logged, start, whole_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a debug model."""
    folder = tmp_path_factory.mktemp("base")
    whole_model(folder)
    return folder


def on(base: Path, *changes: str) -> list[str]:
    """Settings of a run that trains an adapter of that base."""
    return ["model.init_from.preset=null", f"model.init_from.checkpoint={base}", "optimizer.lr=1e-2",
            "adapter.preset=both", "adapter.rank=4", *changes]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_only_the_adapter_is_trained_and_saved(settings, base: Path, tmp_path: Path, capsys) -> None:
    before = weights_digest(base)
    assert train(settings(*on(base, "ema.decay=0.9")), TOKENIZER, "cpu") is None
    said = " ".join(capsys.readouterr().err.split())
    assert "all else is frozen" in said
    final = tmp_path / "run/final"
    names = {"adapter_config.json", "adapter_model.safetensors", "adapter.json", "trained.json"}
    assert {path.name for path in final.iterdir()} - {"README.md"} == names
    assert not list((tmp_path / "run").rglob("model*.safetensors"))
    files = read_adapter(final)
    count = sum(t.numel() for t in files.tensors.values())
    assert f"{count:,} trainable parameters" in said
    assert files.info is not None
    assert (files.info.base, files.info.preset, files.info.seed) == (before, "both", 0)
    assert all(t.any() for name, t in files.tensors.items() if "lora_B" in name)
    assert files.layers == {name for name in files.layers if name.startswith(("language_model.", "image_decoder."))}
    tuned, bare = load(base, adapters=[final]), load(base)
    ids = torch.tensor([[1, 11, 12, 13]])
    assert not torch.allclose(tuned.model(ids).logits, bare.model(ids).logits, atol=1e-3)
    tuned.model.disable_adapters()
    assert torch.equal(tuned.model(ids).logits, bare.model(ids).logits)


@pytest.mark.slow
def test_a_killed_run_continues_the_same_curve(settings, base: Path, tmp_path: Path) -> None:
    changes = on(base, "log_every=1", "adapter.dropout=0.1", "adapter.dora=true")
    assert train(settings(*changes, run="whole"), TOKENIZER, "cpu") is None
    killed = tmp_path / "killed"
    process = start(killed, *changes)
    while process.poll() is None and not ((killed / "log.jsonl").is_file() and len(logged(killed)) >= 12):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert [c.name for c in list_checkpoints(killed)] == ["checkpoint-10"]
    train(settings(*changes, run="killed"), TOKENIZER, "cpu")
    assert logged(killed) == logged(tmp_path / "whole")
    assert_same(tmp_path / "whole/checkpoint-20", killed / "checkpoint-20")
    assert_same(tmp_path / "whole/final", killed / "final")
    assert sum(p.stat().st_size for p in (killed / "checkpoint-20").glob("*.safetensors")) < 300_000


def test_groups_and_frozen_parts(settings, base: Path) -> None:
    changes = on(
        base, "adapter.preset=all", "freeze=[vision]", "optimizer.groups=[{pattern: language_model, lr: 1e-5}]"
    )
    config = settings(*changes)
    model, _ = build(config, TOKENIZER)
    groups = parameter_groups(model, config.optimizer)
    assert [group.lr for group in groups] == [1e-5, 1e-2]
    assert all(".lora_" in name and "visual" not in name for group in groups for name in group.parameters)
    assert any("lm_head" in name for name in groups[1].parameters)


@pytest.mark.slow
def test_an_adapter_is_trained_further(settings, base: Path, tmp_path: Path) -> None:
    train(settings(*on(base, "steps=2"), run="first"), TOKENIZER, "cpu")
    first = tmp_path / "first/final"
    begin = ["steps=1", "optimizer.lr=1e-9", f"adapter.init_from={first}"]
    train(settings(*on(base, *begin), run="second"), TOKENIZER, "cpu")
    old, new = weights(first), weights(tmp_path / "second/final")
    assert all(torch.allclose(new[name], tensor, atol=1e-6) for name, tensor in old.items())
    for change, words in (("adapter.rank=5", "its rank is 4"), ("adapter.preset=llm", "unlike adapter.preset")):
        with pytest.raises(InputError, match=words):
            build(settings(*on(base, *begin, change)), TOKENIZER)


@pytest.mark.slow
def test_another_adapter_does_not_resume_a_run(settings, base: Path, tmp_path: Path) -> None:
    train(settings(*on(base, "steps=1", "save_every=1")), TOKENIZER, "cpu")
    before = (tmp_path / "run/config.yaml").read_text()
    for change, words in (
        ("adapter=null", "'adapter' was"),
        ("adapter.preset=llm", '\'adapter.preset\' was "both" and is now "llm"'),
        ("adapter.rank=8", "'adapter.rank' was 4 and is now 8"),
        ("freeze=[llm]", "'freeze' was"),
        ("data.seed=4", "'seed' was 0 and is now 4"),
    ):
        with pytest.raises(ValueError, match=words):
            train(settings(*on(base, "steps=2", change)), TOKENIZER, "cpu")
        assert (tmp_path / "run/config.yaml").read_text() == before


def test_what_cannot_be_an_adapter_is_refused(settings, base: Path, tmp_path: Path) -> None:
    def words(*changes: str) -> str:
        with pytest.raises(ValueError) as error:
            build(settings(*changes), TOKENIZER)
        return str(error.value)

    assert "adapter.rank must be at least 1, not 0" in words(*on(base, "adapter.rank=0"))
    assert "needs a checkpoint as its base" in words("adapter.preset=llm")
    assert "as they are" in words(*on(base, "model.mmfs.unet=false"))
    assert "Did you mean 'q_proj'?" in words(*on(base, "adapter.targets=[q_porj]"))
    assert "no layer that an adapter can change" in words(*on(base, "adapter.targets=[vae]"))
    assert "not a regular expression" in words(*on(base, "adapter.targets=['(']"))
    assert "needs layers" in words(*on(base, "adapter.preset=null"))
    assert "'llm', 'image', 'both', 'mmfs' or 'all'" in words(*on(base, "adapter.preset=full"))
    train(settings(*on(base, "steps=1"), run="first"), TOKENIZER, "cpu")
    other = tmp_path / "other"
    load("debug").model.save_pretrained(other)
    load("debug").processor.save_pretrained(other)
    further = f"adapter.init_from={tmp_path / 'first/final'}"
    said = words(*on(other, further))
    digests = [weights_digest(folder)[:16] for folder in (base, other)]
    assert all(digest in said for digest in digests)
    build(settings(*on(other, further, "adapter.allow_other_base=true")), TOKENIZER)
    about = json.loads((tmp_path / "first/final/adapter.json").read_text())
    assert about["tasks"] == ["documents"]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.slow
def test_a_quantized_base(settings, base: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torchao")
    changes = on(base, f"model.quantize={kind}", "model.quantize_parts=[llm, image_decoder]", "log_every=1", "steps=6")
    train(settings(*on(base, "log_every=1", "steps=6"), run="exact"), TOKENIZER, "cpu")
    train(settings(*changes), TOKENIZER, "cpu")
    exact, found = logged(tmp_path / "exact"), logged(tmp_path / "run")
    assert found != exact
    assert all(abs(found[step] - loss) <= 0.05 * loss for step, loss in exact.items())
    final = tmp_path / "run/final"
    info = read_adapter(final).info
    assert info is not None
    assert info.base_quantization == kind
    assert load(base, adapters=[final]).trained
    model, _ = build(settings(*changes), TOKENIZER)
    inner = model.get_submodule("language_model.layers.0.self_attn.q_proj").get_base_layer()
    bits = sum(part.numel() * part.element_size() for part in stored(inner.weight)) * 8 / inner.weight.numel()
    assert bits <= {"int8": 9.5, "nf4": 5}[kind]
    unet = model.get_submodule("image_decoder.unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2")
    assert isinstance(unet.get_base_layer(), QuantizedLinear)
    assert type(model.lm_head.head) is torch.nn.Linear


def test_what_cannot_be_quantized_is_refused(settings, base: Path) -> None:
    for changes, words in (
        (on(base, "model.quantize=int4", "model.quantize_parts=[llm, image_decoder]"), "inputs in multiples of 32"),
        (["model.quantize=int8"], "is for the frozen base of an 'adapter'"),
        (on(base, "model.quantize=int8", "model.quantize_parts=[]"), "no frozen linear layer"),
    ):
        with pytest.raises(ValueError, match=words):
            build(settings(*changes), TOKENIZER)
