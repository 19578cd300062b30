"""`mmi convert`: from the original's checkpoint to a folder that generates, and back."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mm_interleaved import MMInterleaved
from mm_interleaved.checkpoints.checkpoint import read_weights
from mm_interleaved.checkpoints.original import NameTable, derived_tensors
from mm_interleaved.pretrained import TOKENIZER, load

from ..conftest import GOLDEN_DATA, awaken, golden_bytes
from .conftest import EXAMPLES, Outcome

Mmi = Callable[..., Outcome]
WORDS = TOKENIZER


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, debug_config) -> Path:
    """A checkpoint in the original's form, in two files, with a file of another kind beside them."""
    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(1)
    network, names = awaken(MMInterleaved(debug_config)), NameTable(debug_config)
    state = {names.theirs(n): p.detach() for n, p in network.named_parameters()}
    state |= {name: compute() for name, compute in derived_tensors(debug_config).items()}
    keys = list(state)
    for i in range(2):
        torch.save({k: state[k] for k in keys[i::2]}, folder / f"pytorch_model-0000{i + 1}-of-00002.bin")
    (folder / "training_args.bin").write_bytes(b"ignored")
    return folder


def test_there_and_back(mmi: Mmi, tmp_path: Path, original: Path) -> None:
    done = mmi("convert", original, tmp_path / "ours", "--config", "debug", "--tokenizer", WORDS)
    assert done.code == 0, done.err
    generated = mmi("generate", EXAMPLES / "original.json", "-o", tmp_path / "out", "-m", tmp_path / "ours",
                    "num_inference_steps=2", "max_new_tokens=3")  # fmt: skip
    assert generated.code == 0, generated.err
    assert "untrained" not in generated.err
    assert mmi("convert", tmp_path / "ours", tmp_path / "back", "--to-original").code == 0
    before, after = {}, {}
    for folder, state in ((original, before), (tmp_path / "back", after)):
        for path in sorted(folder.glob("pytorch_model*.bin")):
            state |= read_weights(path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_golden_set_by_its_settings(mmi: Mmi, tmp_path: Path) -> None:
    """The golden set's own configuration file says what is in its checkpoint."""
    (tmp_path / "state_dict.safetensors").write_bytes(golden_bytes(GOLDEN_DATA / "state_dict.safetensors"))
    done = mmi(
        "convert", tmp_path / "state_dict.safetensors", tmp_path / "ours", "--config", GOLDEN_DATA / "config.json"
    )
    assert done.code == 0, done.err
    assert "without --tokenizer" in done.err
    assert MMInterleaved.from_pretrained(tmp_path / "ours").config.text_config.hidden_size > 0


def test_types(mmi: Mmi, tmp_path: Path, original: Path) -> None:
    done = mmi("convert", original, tmp_path / "ours", "--config", "debug", "--dtype", "bfloat16")
    assert done.code == 0, done.err
    assert MMInterleaved.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
    state = read_weights(tmp_path / "ours" / "model.safetensors")
    kinds = {
        vae: {t.dtype for n, t in state.items() if n.startswith("image_decoder.vae.") is vae} for vae in (True, False)
    }
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}  # the VAE computes in float32: nothing is rounded


def test_larger_images(mmi: Mmi, tmp_path: Path, original: Path) -> None:
    done = mmi("convert", original, tmp_path / "ours", "--config", "debug", "--image-upscale", 2, "--tokenizer", WORDS)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (
        config["vision_config"]["image_size"] == 2 * MMInterleaved.config_class.preset("debug").vision_config.image_size
    )
    generated = mmi("generate", EXAMPLES / "demo.json", "-o", tmp_path / "out", "-m", tmp_path / "ours",
                    "num_inference_steps=1", "max_new_tokens=2")  # fmt: skip
    assert generated.code == 0, generated.err


class _Evil:
    def __reduce__(self):
        return open, ("/tmp/mmi_was_here", "w")


def _with_code(folder: Path) -> None:
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(pickle.dumps({"a": _Evil()}))


def _without_a_shard(folder: Path) -> None:
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def _cut_short(folder: Path) -> None:
    path = folder / "pytorch_model-00002-of-00002.bin"
    path.write_bytes(path.read_bytes()[:5000])


def _without_files(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "options", "words"),
    [
        (_with_code, ["--config", "debug"], "code"),
        (_without_a_shard, ["--config", "debug"], "00002-of-00002"),
        (_cut_short, ["--config", "debug"], "00002-of-00002"),
        (_without_files, ["--config", "debug"], "no "),
        (None, ["--config", "small"], "wrong shape|wrongly shaped|missing"),
        (None, ["--config", "middling"], "neither a preset"),
        (None, ["--config", "debug", "--dtype", "int3"], "--dtype"),
        (None, ["--config", "debug", "--image-upscale", "-1"], "must be positive"),
        (None, ["--config", "debug", "--tokenizer", "nowhere"], "--tokenizer"),
        (None, ["--to-original"], "config.json"),
    ],
)
def test_what_cannot_be_converted(
    mmi: Mmi, tmp_path: Path, original: Path, damage: Callable | None, options: list[str], words: str
) -> None:
    source = shutil.copytree(original, tmp_path / "source")
    if damage is not None:
        damage(source)
    done = mmi("convert", source, tmp_path / "ours", *options)
    assert done.code == 1
    assert any(w in done.err for w in words.split("|")), done.err
    assert "Traceback" not in done.err
    assert {p.name for p in tmp_path.iterdir()} == {"source"}
    assert not Path("/tmp/mmi_was_here").exists()


def test_what_is_converted_already_is_refused(mmi: Mmi, tmp_path: Path) -> None:
    load("debug").model.save_pretrained(tmp_path / "own")
    done = mmi("convert", tmp_path / "own", tmp_path / "ours", "--config", "debug")
    assert done.code == 1
    assert "is a checkpoint of this package already; --to-original converts back" in done.err


def test_what_is_there_is_not_written_over(mmi: Mmi, tmp_path: Path, original: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    done = mmi("convert", original, tmp_path / "ours", "--config", "debug")
    assert done.code == 1
    assert "exists" in done.err
    assert [p.name for p in (tmp_path / "ours").iterdir()] == ["notes.txt"]


PEAK = """
import resource, sys, torch
from pathlib import Path
from mm_interleaved import MMInterleavedConfig
from mm_interleaved.checkpoints.checkpoint import convert_from_original
config = MMInterleavedConfig.from_pretrained(sys.argv[3])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_from_original(Path(sys.argv[1]), Path(sys.argv[2]), config)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_converting_needs_no_more_memory_than_its_largest_file(tmp_path: Path) -> None:
    """A checkpoint of 1 GB in eight files is converted with far less than 1 GB on top of the libraries."""
    config = MMInterleaved.config_class.preset("debug")
    config.text_config.hidden_size, config.text_config.intermediate_size = 1024, 6144
    config = MMInterleaved.config_class.from_dict(config.to_dict())
    config.save_pretrained(tmp_path / "config")
    with torch.device("meta"):
        network = MMInterleaved(config)
    names = NameTable(config)
    shapes = {names.theirs(n): p.shape for n, p in network.named_parameters()}
    derived = derived_tensors(config)
    keys = [*shapes, *derived]
    (tmp_path / "original").mkdir()
    for i in range(8):
        part = {k: torch.zeros(shapes[k]) if k in shapes else derived[k]() for k in keys[i::8]}
        torch.save(part, tmp_path / "original" / f"pytorch_model-0000{i + 1}-of-00008.bin")
    files = [p.stat().st_size for p in (tmp_path / "original").iterdir()]
    assert sum(files) > 3e8
    command = [sys.executable, "-c", PEAK, tmp_path / "original", tmp_path / "ours", tmp_path / "config"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[-1]) * 1024
    print(f"{sum(files) / 1e6:.0f} MB in files of at most {max(files) / 1e6:.0f} MB: {peak / 1e6:.0f} MB more memory")
    assert peak < max(files) + 100e6


def test_weights_one_folder_further_down(mmi: Mmi, tmp_path: Path, original: Path) -> None:
    """The release's repository keeps them in `mm_interleaved_pretrain/`."""
    shutil.copytree(original, tmp_path / "repository" / "mm_interleaved_pretrain")
    done = mmi("convert", tmp_path / "repository", tmp_path / "ours", "--config", "debug")
    assert done.code == 1
    assert "mm_interleaved_pretrain': name that folder" in done.err
