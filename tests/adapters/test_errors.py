"""What cannot be used as an adapter is refused in words, and changes nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm_interleaved import MMInterleaved
from mm_interleaved.adapters.folder import ABOUT, CONFIG, WEIGHTS
from mm_interleaved.adapters.loading import load_adapters, lora_layers
from mm_interleaved.checkpoints.digest import weights_digest
from mm_interleaved.io import InputError
from mm_interleaved.pretrained import load

from ..cli.conftest import EXAMPLES
from .make_adapter import make


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "adapter"
    make(base, folder, preset="llm", rank=2)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of the adapter for a test to damage."""
    return shutil.copytree(good, tmp_path / "adapter")


class Opens:
    """A pickle that would make a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def edit(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Opens(folder.parent / "opened")))


FIRST = "base_model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "adapter_model.safetensors' is damaged"),
    "pickle": (only_a_pickle, "is a pickle, which can run any code"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "there is no adapter_model.safetensors in it"),
    "no settings": (lambda f: (f / CONFIG).unlink(), "so it is not an adapter"),
    "no folder": (lambda f: shutil.rmtree(f), "there is no such folder"),
    "not known": (lambda f: (f / ABOUT).unlink(), "nothing says which model it was trained on"),
    "a key less": (lambda f: rewrite(f, lambda t: t.pop(FIRST)), "lacks language_model.layers.0.self_attn.q_proj"),
    "a layer less": (
        lambda f: rewrite(f, lambda t: [t.pop(FIRST), t.pop(FIRST.replace("lora_A", "lora_B"))]),
        "names 'language_model.layers.0.self_attn.q_proj', unlike",
    ),
    "a key more": (lambda f: rewrite(f, lambda t: t.update({"lm_head.new.weight": torch.zeros(2)})), "which is not"),
    "another rank": (lambda f: edit(f, r=3), "instead of"),
    "rank 0": (lambda f: edit(f, r=0), "the rank 'r' is 0"),
    "another shape": (lambda f: rewrite(f, lambda t: t.update({FIRST: torch.zeros(2, 5)})), "and the weight there is"),
    "IA3": (lambda f: edit(f, peft_type="IA3"), "only LoRA adapters can be used"),
    "whole modules": (lambda f: edit(f, modules_to_save=["lm_head"]), "'modules_to_save' is set"),
    "changes the base": (lambda f: edit(f, init_lora_weights="pissa"), "'init_lora_weights' is 'pissa'"),
    "not JSON": (lambda f: (f / CONFIG).write_text("{"), CONFIG),
    "other fields": (lambda f: (f / ABOUT).write_text('{"base": 3}'), ABOUT),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders(base: Path, folder: Path, name: str) -> None:
    damage, words = DAMAGE[name]
    damage(folder)
    model = load(base).model
    with pytest.raises(InputError) as error:
        model.load_adapter(folder)
    assert words in str(error.value)
    assert "adapter" in str(error.value)
    assert not (folder.parent / "opened").exists()
    assert not lora_layers(model)
    assert weights_digest(model) == weights_digest(base)


def test_another_base(base: Path, good: Path, tmp_path: Path) -> None:
    other = MMInterleaved.from_pretrained(base)
    with torch.no_grad():
        other.lm_head.new.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    load(base).processor.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError) as error:
        load(tmp_path / "other", adapters=[good])
    for part in (base, tmp_path / "other"):
        assert weights_digest(part)[:16] in str(error.value)
        assert str(part) in str(error.value)
    assert lora_layers(load(tmp_path / "other", adapters=[good], allow_other_base=True).model)
    with pytest.raises(InputError, match=r"no such layer|the weight there is"):
        load("small", adapters=[good], allow_other_base=True)


def test_models_and_adapters_in_each_other_s_place(base: Path, good: Path) -> None:
    with pytest.raises(InputError, match="this is a whole model, not an adapter"):
        load(base, adapters=[base])
    with pytest.raises(InputError, match="is an adapter, not a model"):
        load(good)


def test_an_adapter_is_not_added_twice(base: Path, good: Path) -> None:
    with pytest.raises(InputError, match="given twice"):
        load(base, adapters=[good, good / "." / ".." / good.name])


def test_an_adapter_that_fails_takes_those_before_it_along(base: Path, good: Path, folder: Path) -> None:
    model = load(base).model
    before = set(model.state_dict())
    rewrite(folder, lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(InputError):
        load_adapters(model, [good, folder])
    assert not lora_layers(model)
    assert set(model.state_dict()) == before
    load_adapters(model, [good])


def test_dora_is_not_added_up(base: Path, good: Path, tmp_path: Path) -> None:
    make(base, tmp_path / "dora", preset="llm", dora=True)
    with pytest.raises(InputError, match="one of them is a DoRA"):
        load(base, adapters=[good, tmp_path / "dora"])


def test_commands(base: Path, good: Path, tmp_path: Path, mmi) -> None:
    shown = mmi("info", good)
    assert shown.code == 0, shown.err
    for words in ("LoRA adapter", "vqav2", "language_model.layers", weights_digest(base)[:20]):
        assert words in shown.out
    about = json.loads(mmi("info", good, "--json").out)
    assert (about["rank"], about["alpha"], about["layers"]) == (2, 4, {"language_model.layers": 28})
    out = tmp_path / "merged"
    for arguments, words in (
        (["--merge", good, out], "--merge needs the base"),
        (["--merge", good, "--model", base, out, tmp_path / "more"], "one folder, the one to write"),
        (["--merge", base, "--model", base, out], "this is a whole model"),
        (["--model", base, out, tmp_path / "more"], "belong to --merge"),
        (["--merge", good, "--model", "debug", out], "it was trained on the weights"),
    ):
        done = mmi("convert", *arguments)
        assert done.code == 1
        assert words in done.err
    assert not list(tmp_path.iterdir())
    quick = ["num_inference_steps=1", "max_new_tokens=2"]
    done = mmi("generate", EXAMPLES / "original.json", "-o", tmp_path / "out", "-m", base, "--adapter", good, *quick)
    assert done.code == 0, done.err
    assert f"{base} + {good}" in (tmp_path / "out/results.json").read_text()
    done = mmi("generate", EXAMPLES / "original.json", "-o", tmp_path / "none", "-m", base, "--adapter", base, *quick)
    assert done.code == 1
    assert "this is a whole model" in done.err
