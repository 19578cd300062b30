"""Epochs as steps, runs that are made longer, and the links to checkpoints."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import PIL.Image
import pytest
import torch
from rich.console import Console

from mm_interleaved.configuration import load_config
from mm_interleaved.data import build_loader
from mm_interleaved.pretrained import TOKENIZER, load
from mm_interleaved.training.arguments import training_arguments
from mm_interleaved.training.building import build_processor
from mm_interleaved.training.checkpoints import list_checkpoints, point
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.epochs import length_of_run
from mm_interleaved.training.run import train
from mm_interleaved.validation import ConfigError

from .conftest import ROOT, arguments, logged
from .stand_in import Colors


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("keep", [True, False])
def test_the_batches_of_an_epoch_are_counted_without_their_images(
    settings, tmp_path: Path, workers: int, keep: bool
) -> None:
    lines = (ROOT / "examples/training.jsonl").read_text().splitlines()
    (tmp_path / "many.jsonl").write_text("".join(f"{line}\n" for line in 16 * lines))
    data = settings(
        f"data.num_workers={workers}", f"data.sources.0.keep_remainder={'true' if keep else 'false'}",
        f"data.sources.0.root={tmp_path}", "data.sources.0.shards=[many.jsonl]",
        f"data.sources.0.image_root={ROOT / 'examples'}",
    ).data  # fmt: skip
    loader = build_loader(data, load("debug").processor)
    counted = loader.count_batches()
    assert counted == sum(1 for _ in loader) > 5
    assert loader.count_batches() == counted  # also after an epoch


def test_epochs_become_steps(settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("steps=null", "epochs=1.5", "save_every=1", "log_every=1", "data.sources.0.batch_size=1")
    config = settings(*changes, "accumulation=2")
    batches = build_loader(config.data, load("debug").processor).count_batches()
    train(config, TOKENIZER, "cpu")
    steps = -(-3 * batches // 4)
    assert list_checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{steps}"
    assert logged(tmp_path / "run", "epochs")[steps] == pytest.approx(steps * 2 / batches)
    shown = " ".join(capsys.readouterr().err.split())
    assert f"an epoch has {batches} batches, counted in" in shown
    assert f"1.5 epochs of {batches / 2:,.1f} steps: {steps} steps" in shown
    train(settings(*changes, "accumulation=2", "epochs=3"), TOKENIZER, "cpu")
    shown = " ".join(capsys.readouterr().err.split())
    assert "counted in" not in shown  # once is enough
    assert f"the run had {steps} steps and now has {-(-3 * batches // 2)}" in shown
    assert list_checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{-(-3 * batches // 2)}"


def test_an_epoch_is_a_pass_over_the_data_without_replay(settings, capsys) -> None:
    changes = ("steps=null", "epochs=1", "save_every=0", "data.sources.0.batch_size=1")
    batches = build_loader(settings(*changes).data, load("debug").processor).count_batches()
    old = "replay={share: 0.5, sources: [{type: toyworld, name: old, batch_size: 1, options: {size: 48}}]}"
    train(settings(*changes, old), TOKENIZER, "cpu")
    assert f"1 epoch of {2 * batches:,.1f} steps: {2 * batches} steps" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["samples.count=0"], "samples.count"),
        (["epochs=2"], "give one of 'steps' and 'epochs', not both"),
        (["steps=null"], "give one of 'steps' and 'epochs', not neither"),
        (["steps=null", "epochs=2", "data.sampling=forever"], "needs data that end"),
        (["steps=null", "epochs=0"], "epochs must be greater than 0"),
    ],
)
def test_lengths_that_cannot_be_meant(tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs/debug.yaml", TrainConfig, arguments(tmp_path, *changes))


def test_a_loader_that_cannot_count(settings) -> None:
    with pytest.raises(ValueError, match=r"'epochs' needs a loader that counts its batches, and Colors cannot"):
        train(settings("steps=null", "epochs=1"), TOKENIZER, "cpu", Colors)


@pytest.mark.slow
def test_a_longer_run_follows_the_longer_schedule(settings, tmp_path: Path, capsys) -> None:
    rates = {}
    for run, lengths in (("longer", (2, 6)), ("whole", (6,))):
        for steps in lengths:
            train(settings(f"steps={steps}", "save_every=2", "log_every=1", run=run), TOKENIZER, "cpu", Colors)
        rates[run] = logged(tmp_path / run, "lr/rest")
    assert "the run had 2 steps and now has 6" in " ".join(capsys.readouterr().err.split())
    assert [rates["longer"][step] for step in (3, 4, 5, 6)] == [rates["whole"][step] for step in (3, 4, 5, 6)]
    saved = [torch.load(tmp_path / run / "checkpoint-6/optimizer.pt", weights_only=True) for run in rates]
    assert saved[0]["param_groups"][0]["lr"] == saved[1]["param_groups"][0]["lr"]


def test_last_stands_for_the_newest_checkpoint(settings, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(settings("steps=4", "save_every=2", "keep_checkpoints=1"), TOKENIZER, "cpu", Colors)
    assert os.readlink(run / "last") == "checkpoint-4"
    assert not (run / "best").exists()
    assert load(run / "last").trained
    run.rename(tmp_path / "moved")
    assert load(tmp_path / "moved/last").trained


def test_links_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part/file").write_text(name)

    def refuse(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    kinds = []
    for refused, target in ((True, "checkpoint-1"), (True, "checkpoint-2"), (False, "checkpoint-1"),
                            (True, "checkpoint-2"), (False, "checkpoint-1")):  # fmt: skip
        with monkeypatch.context() as patch:
            if refused:
                patch.setattr(Path, "symlink_to", refuse)
            point(tmp_path / "last", target)
        kinds.append((tmp_path / "last").is_symlink())
        assert (tmp_path / "last/part/file").read_text() == target
    assert kinds == [False, False, True, False, True]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2", "last"]


def test_samples_show_the_model_before_and_while_it_is_trained(settings, tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = ["sample_every=1", "optimizer.lr=1e-30", f"samples.documents={ROOT / 'examples/demo.json'}"]
    train(settings("steps=1", *short), TOKENIZER, "cpu", Colors)
    names = {p.name for p in (run / "samples").iterdir()}
    assert {"0000000.png", "0000000.txt", "0000001.png", "0000001.txt"} <= names
    for kind in ("png", "txt"):  # the weights hardly changed, and the seeds did not
        assert (run / f"samples/0000000.{kind}").read_bytes() == (run / f"samples/0000001.{kind}").read_bytes()
    page = (run / "report.html").read_text()
    assert page.index("samples/0000000_") < page.index("samples/0000001_")
    before = (run / "samples/0000000.png").stat().st_mtime_ns
    train(settings("steps=1", *short), TOKENIZER, "cpu", Colors)
    assert (run / "samples/0000000.png").stat().st_mtime_ns == before


def test_the_batches_of_other_data_are_counted_again(settings, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    PIL.Image.new("RGB", (8, 8)).save(folder / "0.png")
    source = "data.sources=[{type: imagefolder, batch_size: 1, packing: single}]"
    config = settings("steps=null", "epochs=2", f"data.root={folder}", source)
    args = training_arguments(config, "cpu")
    for count in (3, 4):
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "A square."}\n' * count)
        loader = build_loader(config.data, build_processor(config.model, TOKENIZER))
        assert length_of_run(config, loader, args, Console(quiet=True)).steps == 2 * count
