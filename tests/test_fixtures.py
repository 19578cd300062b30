"""What earlier versions of this package wrote (`tests/fixtures`) is loaded, or refused by name with what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from mm_interleaved import MMInterleaved, MMInterleavedProcessor
from mm_interleaved.cli.report import write_report
from mm_interleaved.cli.results import with_candidates
from mm_interleaved.configuration import load_config
from mm_interleaved.document import Document, Image, Text
from mm_interleaved.evaluation import EvaluationError
from mm_interleaved.pretrained import load
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.run import train
from mm_interleaved.validation import ConfigError

from .cli.conftest import Outcome, mmi

__all__ = ["mmi"]
ROOT = Path(__file__).parents[1]
VERSIONS = sorted(path for path in (ROOT / "tests/fixtures").iterdir() if path.is_dir())
# What this version refuses, and words of its message, as ("v0", "run"): "made by an earlier version.*start a new run".
REFUSED: dict[tuple[str, str], str] = {
    ("v0", "run"): "earlier version of this package.*start a new run",  # places in data were those of one process
}
IMAGES = 2  # of 255; how far images may be apart
RENAMED = {"things_mentioned": "objects_mentioned"}  # values whose name was another then
Mmi = Callable[..., Outcome]

pytestmark = pytest.mark.parametrize("fixture", VERSIONS, ids=lambda path: path.name)


@contextmanager
def loads_or_refuses(fixture: Path, name: str) -> Iterator[None]:
    """The block must pass, or fail with the words in `REFUSED`."""
    words = REFUSED.get((fixture.name, name))
    if words is None:
        yield
        return
    with pytest.raises(ValueError, match=words):
        yield


def apart(a: Path, b: Path) -> int:
    """The largest difference of two images, of 255."""
    x, y = (np.asarray(PIL.Image.open(path).convert("RGB")).astype(int) for path in (a, b))
    assert x.shape == y.shape
    return int(np.abs(x - y).max())


def document() -> Document:
    """The one that `scripts/make_fixtures.py` computed the stored logits of."""
    images = ROOT / "examples/images"
    return Document([Text("A fox."), Image(images / "fox.png"), Text("A house."), Image(images / "house.png"),
                     Text("The fox lives there.")])  # fmt: skip


@pytest.mark.parametrize("way", ["from_pretrained", "load"])
def test_a_checkpoint_gives_its_logits(fixture: Path, way: str) -> None:
    folder = fixture / "checkpoint"
    expected = load_file(folder / "expected.safetensors")
    with loads_or_refuses(fixture, "checkpoint"):
        if way == "load":
            loaded = load(folder, torch.float32)
            model, processor = loaded.model, loaded.processor
        else:
            model = MMInterleaved.from_pretrained(folder, dtype=torch.float32).eval()
            processor = MMInterleavedProcessor.from_pretrained(folder)
        batch = processor([document()])
        assert torch.equal(batch.input_ids, expected["input_ids"])
        with torch.no_grad():
            out = model(batch.input_ids, attention_mask=batch.attention_mask, pixel_values=batch.pixel_values)
        torch.testing.assert_close(out.logits[..., ::25], expected["logits"], rtol=1e-4, atol=1e-4)


def test_a_checkpoint_survives_being_saved_again(fixture: Path, tmp_path: Path) -> None:
    with loads_or_refuses(fixture, "checkpoint"):
        load(fixture / "checkpoint").model.save_pretrained(tmp_path)
        old, new = (load_file(folder / "model.safetensors") for folder in (fixture / "checkpoint", tmp_path))
        assert old.keys() == new.keys()
        different = [name for name in old if not torch.equal(old[name].to(new[name].dtype), new[name])]
        assert not different  # the VAE's are float32 now; nothing is rounded


def rewrite(settings: Path) -> None:
    """Renames the keys of an earlier version as the errors about them say."""
    for _ in range(30):
        try:
            load_config(settings, TrainConfig)
            return
        except ConfigError as error:
            told = re.match(r"unknown key '(\w+)' in (\S+) \(.*\)\. It is now (?:'([\w.]+)')?", str(error))
            if told is None:
                raise
            tree = OmegaConf.load(settings)
            owner = OmegaConf.select(tree, told[2])
            value = owner.pop(told[1])
            if told[3] is None:  # an origin of weights, which the stored run does not have
                assert not value
            elif value is not None and not told[3].startswith("options."):  # which are the toy world's
                OmegaConf.update(owner, told[3], value)
            OmegaConf.save(tree, settings)
    raise AssertionError("the file is refused again and again")


def test_a_run_resumes(fixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps after the checkpoint have the losses that they had in the run that went through."""
    shutil.unpack_archive(fixture / "run.tar.xz", tmp_path, filter="data")
    shutil.copytree(fixture / "checkpoint", tmp_path / "checkpoint")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    expected = {int(k): v for k, v in json.loads((tmp_path / "run/expected.json").read_text())["losses"].items()}
    before = len((tmp_path / "run/log.jsonl").read_text().splitlines())
    settings = tmp_path / "run/config.yaml"
    rewrite(settings)
    with loads_or_refuses(fixture, "run"):
        assert train(load_config(settings, TrainConfig, []), device="cpu") is None
        entries = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        losses = {e["step"]: e["loss"] for e in entries if "loss" in e}
        assert losses == pytest.approx(expected, rel=1e-4)
        assert len({round(loss, 3) for loss in losses.values()}) == len(losses) > before > 0
        assert load(tmp_path / "run/final").trained


def _same_program(results: Path) -> bool:
    """Whether it was written with the packages that are installed, whose settings the digest of weights contains."""
    wrote = json.loads((results / "results.json").read_text())["versions"]
    return all(wrote[name] == version(name) for name in ("mm-interleaved", "transformers"))


def test_results_are_taken_up(fixture: Path, tmp_path: Path, mmi: Mmi, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is kept, what was cut off is made again and is what it was."""
    shutil.copytree(fixture / "results", tmp_path, dirs_exist_ok=True)
    shutil.copytree(fixture / "checkpoint", tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    was, now = fixture / "results/results", tmp_path / "results"
    for task in ("coco_karpathy", "coco"):
        path = now / task / "predictions.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    (now / "coco/images/000001_0.png").unlink()
    done = mmi("evaluate", "evaluate.yaml", "--device", "cpu")
    if done.code and not _same_program(was):
        assert "these predictions are of another run: 'weights' was" in done.err or "'version' was" in done.err
        assert "Name another folder with output=..., or replace them with --overwrite" in done.err
        return
    with loads_or_refuses(fixture, "results"):
        if done.code:
            raise EvaluationError(done.err)
        for task in ("coco_karpathy", "coco"):
            assert (now / task / "predictions.jsonl").read_text() == (was / task / "predictions.jsonl").read_text()
        assert apart(now / "coco/images/000001_0.png", was / "coco/images/000001_0.png") <= IMAGES
        speed = json.loads((now / "results.json").read_text())["speed"]
        made = {task: speed[task]["samples"] for task in speed}
        assert made == {"coco_karpathy": 2, "coco": 2}  # of 4 and 2: a batch is made again as a whole
        metrics = [json.loads((folder / "results.json").read_text())["tasks"]["coco_karpathy"] for folder in (was, now)]
        assert {RENAMED.get(name, name) for name in metrics[0]["metrics"]} == metrics[1]["metrics"].keys()


def test_the_demo_has_a_report(fixture: Path, tmp_path: Path) -> None:
    shutil.copytree(fixture / "demo", tmp_path / "demo")
    shutil.copytree(ROOT / "examples/images", tmp_path / "examples/pictures")  # the folder's name then
    written = json.loads((fixture / "demo/results.json").read_text())
    records = [with_candidates(record) for record in written]
    generated = [s for record in records for s in record["segments"] if s["generated"]]
    assert all([s["image"]] == s["candidates"] for s in generated if "image" in s)
    assert [s["turn"] for s in records[0]["segments"] if s["generated"]] == list(range(8))
    page = write_report(records, tmp_path / "demo", records[0]["run"], trained=True)
    assert page.count("<img") == sum("image" in s for record in records for s in record["segments"])
