"""An adapter of one process, loaded in another and merged, gives the same tokens and numbers on every path."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from mm_interleaved import MMInterleaved
from mm_interleaved.adapters.loading import adapter_bytes, load_adapters, lora_layers, merge_adapters
from mm_interleaved.pretrained import Loaded, load

from . import make_adapter
from .make_adapter import RESULTS, make, results


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As the other process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter that another process made, with the results of that process."""
    folder = tmp_path_factory.mktemp("made") / "adapter"
    program = [sys.executable, make_adapter.__file__, str(base), str(folder)]
    subprocess.run(program, check=True, capture_output=True)
    return folder


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype == torch.int64:
            assert torch.equal(found[name], value), name
        else:  # the images of documents are rounded to 8 bits
            assert far(found[name], value) <= max(bound, 1.01 / 255 if name.startswith("images_") else 0), name


@pytest.mark.slow
def test_of_another_process_and_merged(base: Path, adapter: Path, tmp_path: Path, mmi) -> None:
    there = load_file(adapter / RESULTS)
    loaded = load(base, adapters=[adapter])
    here = results(loaded.model, loaded.processor)
    assert_same(here, there, 1e-5)
    done = mmi("convert", "--merge", adapter, "--model", base, tmp_path / "merged")
    assert done.code == 0, done.err
    merged = load(tmp_path / "merged")
    assert not lora_layers(merged.model)
    assert {n: p.dtype for n, p in merged.model.named_parameters()} == {
        n: p.dtype for n, p in load(base).model.named_parameters()
    }
    assert_same(results(merged.model, merged.processor), there, 1e-4)
    bare = load(base)
    without = results(bare.model, bare.processor)
    for name in there:  # the adapter matters on every path
        assert not torch.equal(without[name], there[name]), name


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_other_kinds(base: Path, tmp_path: Path, kind: str) -> None:
    changes = {"dora": {"dora": True}, "rslora": {"rslora": True, "alpha": 2.0}}[kind]
    made = make(base, tmp_path / "adapter", **changes)
    loaded = load(base, adapters=[tmp_path / "adapter"])
    batch = loaded.processor(text=["a red house on a hill"])
    expected = made(**batch).logits
    assert far(loaded.model(**batch).logits, expected) <= 1e-5
    assert far(load(base).model(**batch).logits, expected) > 1e-2
    merge_adapters(loaded.model)
    assert far(loaded.model(**batch).logits, expected) <= 1e-5


@pytest.mark.slow
def test_plain_peft_and_transformers_load_it(base: Path, adapter: Path) -> None:
    loaded = load(base, adapters=[adapter])
    batch = loaded.processor(text=["a red house on a hill"])
    expected = loaded.model(**batch).logits
    assert far(PeftModel.from_pretrained(load(base).model, adapter).eval()(**batch).logits, expected) <= 1e-5
    assert far(MMInterleaved.from_pretrained(adapter)(**batch).logits, expected) <= 1e-5
    model = MMInterleaved.from_pretrained(base)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model.load_adapter(adapter, "style")
    assert torch.equal(torch.get_rng_state(), before)
    assert far(model(**batch).logits, expected) <= 1e-5
    model.disable_adapters()
    assert far(model(**batch).logits, load(base).model(**batch).logits) <= 1e-5
    model.enable_adapters()
    assert far(model(**batch).logits, expected) <= 1e-5


@pytest.mark.slow
def test_adapters_are_added_up(base: Path, adapter: Path, tmp_path: Path) -> None:
    make(base, tmp_path / "second", seed=3, preset="llm", rank=2)
    folders = [adapter, tmp_path / "second"]
    both = load(base, adapters=folders)
    batch = both.processor(text=["a red house on a hill"])
    logits = both.model(**batch).logits
    other_order = load(base, adapters=folders[::-1])
    assert far(other_order.model(**batch).logits, logits) <= 1e-5
    for folder in folders:
        assert far(load(base, adapters=[folder]).model(**batch).logits, logits) > 1e-3
    weight = "language_model.layers.0.self_attn.q_proj.weight"
    updates = []
    for folder in folders:
        one = load(base, adapters=[folder]).model
        updates.append(one.get_submodule(weight.removesuffix(".weight")).get_delta_weight("default"))
    merge_adapters(both.model)
    assert far(both.model(**batch).logits, logits) <= 1e-5
    expected = load(base).model.get_parameter(weight) + sum(updates)
    assert far(both.model.get_parameter(weight), expected) <= 1e-6


def test_half_precision(base: Path, adapter: Path) -> None:
    """With bfloat16 weights: near the results in float32, and merged weights near the unmerged."""
    exact = load(base, adapters=[adapter])
    batch = exact.processor(text=["a red house on a hill"])
    expected = exact.model(**batch).logits
    half = load(base, torch.bfloat16, adapters=[adapter])
    assert adapter_bytes(half.model) * 2 == adapter_bytes(exact.model)
    found = half.model(**batch).logits
    bare = far(load(base, torch.bfloat16).model(**batch).logits, load(base).model(**batch).logits)
    assert far(found, expected) <= 2 * bare
    merge_adapters(half.model)
    assert far(half.model(**batch).logits, expected) <= 2 * bare
    assert half.model.get_parameter("lm_head.head.weight").dtype == torch.bfloat16


def test_a_quantized_base(base: Path, adapter: Path) -> None:
    pytest.importorskip("torchao")
    exact = load(base, adapters=[adapter])
    loaded = load(base, quantization="int8", adapters=[adapter])
    batch = loaded.processor(text=["a red house on a hill"])
    expected = exact.model(**batch).logits
    assert 0 < far(loaded.model(**batch).logits, expected) <= 0.05
    with pytest.raises(ValueError, match="cannot be merged into a quantized model"):
        merge_adapters(loaded.model)
    assert lora_layers(loaded.model)


@pytest.mark.slow
def test_the_processor_of_the_training(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    about = json.loads((folder / "adapter.json").read_text())
    about["processor"] |= {"crop": "squash", "chat_template": "{{ messages }}"}
    (folder / "adapter.json").write_text(json.dumps(about))
    loaded: Loaded = load(base, adapters=[folder])
    assert (loaded.processor.crop, loaded.processor.chat_template) == ("squash", "{{ messages }}")
    with pytest.raises(ValueError, match="differ from those of"):
        load(base, adapters=[adapter, folder])
    about["processor"]["special_tokens"]["soi_token_id"] += 1
    (folder / "adapter.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="special_tokens"):
        load_adapters(load(base).model, [folder], load(base).processor)
