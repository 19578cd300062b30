"""`mmi download` against a hub of our own: sizes and licences first, resumable, checked."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mm_interleaved.checkpoints.hub import SETS
from mm_interleaved.cli.console import console, output

from .conftest import Outcome
from .fake_hub import COMMIT, FakeHub

WEIGHTS = os.urandom(22_000_000)  # huggingface_hub writes 10 MiB at a time


ANNOTATIONS = {
    "coco/annotations/coco_karpathy_test.json": b"[]",
    "flickr30k/test1k.token.coco_format": b"{}",
    "refcoco/refcoco_testA.jsonl": b"{}",
    "VizWiz/val.json": b"[]",
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with everything that `mmi download` knows, small, each repository laid out as the real one."""
    root = tmp_path / "hub"
    for component in SETS["all"]:
        folder = root / component.repository
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text("# About")
        (folder / "demo.mp4").write_bytes(b"not asked for")
        if component.name == "mm-interleaved":
            continue
        (folder / "config.json").write_text("{}")
        if any(pattern.startswith("unet") for pattern in component.patterns):
            (folder / "unet").mkdir(exist_ok=True)
            (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(WEIGHTS[:1000])
            (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(WEIGHTS[:1000])
        else:
            (folder / "tokenizer.model").write_bytes(WEIGHTS[:500])
            (folder / "pytorch_model.bin").write_bytes(WEIGHTS)
    (root / "openai/clip-vit-large-patch14/model.safetensors").write_bytes(WEIGHTS[:2000])
    release = root / "OpenGVLab/MM-Interleaved"
    (release / "mm_interleaved_pretrain").mkdir()
    (release / "mm_interleaved_pretrain/pytorch_model-00001-of-00002.bin").write_bytes(WEIGHTS)
    (release / "mm_interleaved_pretrain/pytorch_model-00002-of-00002.bin").write_bytes(WEIGHTS[:1000])
    (release / "mm_interleaved_pretrain/pytorch_model.bin.index.json").write_text("{}")
    for name, content in ANNOTATIONS.items():
        path = release / "assets/datasets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with FakeHub(root) as hub:
        yield hub


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(mmi: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call `mmi download` in this process; huggingface_hub read its settings when it was imported."""

    def call(hub: FakeHub, folder: Path, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            hub.address + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for stream in (console, output):
            monkeypatch.setattr(stream, "width", 200)
        monkeypatch.setattr("sys.stdin", io.StringIO())  # nobody there
        done = mmi("download", *arguments, "-o", folder)
        return done.code, done.out, done.err

    return call


@pytest.mark.slow
def test_the_release(hub: FakeHub, tmp_path: Path) -> None:
    """In a process of its own, where the environment says which hub it is."""
    environment = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                   "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "COLUMNS": "200"}  # fmt: skip
    command = [sys.executable, "-m", "mm_interleaved.cli", "download", "release", "--yes", "-o", tmp_path / "models"]
    done = subprocess.run(command, env={**os.environ, **environment}, text=True, capture_output=True, timeout=120,
                          check=False)  # fmt: skip
    code, out, err = done.returncode, done.stdout, done.stderr
    assert code == 0, err
    assert "apache-2.0" in out
    assert "22.0 MB" in out
    models = tmp_path / "models"
    assert (models / "mm-interleaved" / "pytorch_model-00001-of-00002.bin").read_bytes() == WEIGHTS
    assert {p.name for p in (models / "mm-interleaved").iterdir()} == {
        "README.md", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
    }  # fmt: skip
    assert (models / "vicuna-13b-v1.3-tokenizer" / "tokenizer.model").is_file()
    assert not (models / "vicuna-13b-v1.3-tokenizer" / "pytorch_model.bin").exists()  # the release holds these weights
    assert not list(models.rglob("*.mp4"))


def test_annotations_go_into_the_documented_tree(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    code, out, err = run(hub, tmp_path / "datasets", "annotations", "--yes")
    assert code == 0, err
    assert "annotations" in out
    found = {str(p.relative_to(tmp_path / "datasets")): p.read_bytes() for p in (tmp_path / "datasets").rglob("*.*")
             if p.is_file()}  # fmt: skip
    assert found == ANNOTATIONS


def test_base_components(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    code, _, err = run(hub, tmp_path / "models", "base", "-y")
    assert code == 0, err
    unet = tmp_path / "models" / "stable-diffusion-2-1-base" / "unet"
    assert [p.name for p in unet.iterdir()] == ["diffusion_pytorch_model.safetensors"]
    assert not (tmp_path / "models" / "clip-vit-large-patch14" / "pytorch_model.bin").exists()
    assert (tmp_path / "models" / "vicuna-13b-v1.3" / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_nothing_is_fetched_before_the_answer(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    code, out, _ = run(hub, tmp_path / "models", "release")  # nobody there to say yes
    assert code == 1
    assert "licence" in out
    assert not (tmp_path / "models").exists()
    assert not hub.sent


def test_a_broken_transfer_goes_on_where_it_broke(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.break_after["pytorch_model-00001-of-00002.bin"] = 15_000_000
    code, _, err = run(hub, tmp_path / "models", "release", "--yes")
    if code:  # then the next try must go on
        assert "Run the same command again" in err
        code, _, err = run(hub, tmp_path / "models", "release", "--yes")
    assert code == 0, err
    assert (tmp_path / "models" / "mm-interleaved" / "pytorch_model-00001-of-00002.bin").read_bytes() == WEIGHTS
    first, second = hub.sent["pytorch_model-00001-of-00002.bin"]
    assert first[0] == 0
    assert second[0] > 0
    assert second[1] == len(WEIGHTS) - second[0]


def test_what_is_there_is_not_fetched_again(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    for _ in range(2):
        assert run(hub, tmp_path / "models", "release", "--yes")[0] == 0
    assert len(hub.sent["pytorch_model-00001-of-00002.bin"]) == 1


def test_damage_is_noticed_and_removed(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.wrong.add("pytorch_model-00001-of-00002.bin")
    code, _, err = run(hub, tmp_path / "models", "release", "--yes")
    assert code == 1
    assert "damaged" in err
    assert not (tmp_path / "models" / "mm-interleaved" / "pytorch_model-00001-of-00002.bin").exists()
    hub.wrong.clear()
    assert run(hub, tmp_path / "models", "release", "--yes")[0] == 0


def test_a_repository_by_name_without_the_same_weights_as_pickles(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    folder = hub.root / "someone" / "theirs"
    (folder / "unet").mkdir(parents=True)
    names = ["config.json", "unet/diffusion_pytorch_model.safetensors", "model-00001-of-00002.safetensors"]
    for name in [*names, "unet/diffusion_pytorch_model.bin", "pytorch_model-00001-of-00002.bin"]:
        (folder / name).write_text("{}")
    assert run(hub, tmp_path / "models", "someone/theirs", "--yes", "--revision", COMMIT)[0] == 0
    here = tmp_path / "models" / "theirs"
    assert {str(p.relative_to(here)) for p in here.rglob("*") if p.is_file() and ".cache" not in p.parts} == set(names)


def test_what_is_not_there(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    code, _, err = run(hub, tmp_path / "models", "someone/else", "--yes")
    assert code == 1
    assert "someone/else" in err
    assert "Traceback" not in err
    code, _, err = run(hub, tmp_path / "models", "everything")
    assert code == 1
    assert "release, base, all" in err


def test_no_network(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.address = "http://127.0.0.1:9"  # nobody listens there
    code, _, err = run(hub, tmp_path / "models", "release", "--yes")
    assert code == 1
    assert "does not answer" in err
    assert "Traceback" not in err
