"""What MMFS is worth: four runs that begin as one function, and `scripts/ablate`, which examines them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from mm_interleaved import MMInterleaved
from mm_interleaved.configuration import load_config
from mm_interleaved.data import build_loader
from mm_interleaved.pretrained import load
from mm_interleaved.training.building import build
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.pipeline import prepare_documents
from mm_interleaved.validation import ConfigError

from .conftest import ROOT, whole_model

FILES = ("ablation", "ablation_no_llm", "ablation_no_unet", "ablation_none")
SMALL = [
    "precision=float32", "losses.vae_dtype=float32", "data.num_workers=0", "data.batch_size=2",
    "data.sources.0.batch_size=2", "losses.image_fraction=0.2", "losses.noise_samples_per_image=1",
    "shapes={multiple: 1}",
]  # fmt: skip


def module(path: str) -> ModuleType:
    """A script as a module."""
    name = Path(path).stem
    spec = importlib.util.spec_from_loader(name, SourceFileLoader(name, str(ROOT / path)))
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # dataclasses and the like look there
    spec.loader.exec_module(made)
    return made


def first_losses(file: str, folder: Path, *changes: str) -> tuple[MMInterleaved, tuple[float, float]]:
    """The model of a run, and its two losses of the run's first batch."""
    config = load_config(
        ROOT / f"configs/small/{file}.yaml", TrainConfig, [*SMALL, *changes, f"model.init_from.checkpoint={folder}"]
    )
    model, processor = build(config)
    batch = next(iter(build_loader(config.data, processor, rank=0, world_size=1)))
    inputs = prepare_documents(model.train(), config.losses, config.shapes)(batch, 7, torch.device("cpu"))
    inputs.pop("stats")
    with torch.no_grad():
        outputs = model(**inputs)
    return model, (float(outputs.loss_txt), float(outputs.loss_img))


@pytest.mark.parametrize("start", ["closed", "fresh"])
def test_all_four_begin_as_one_function(tmp_path: Path, start: str) -> None:
    given, _ = whole_model(tmp_path)
    anew = ["model.weights=[{from: fresh, parameters: synchronizer}]"] if start == "fresh" else []
    changes = dict.fromkeys(FILES[:-1], anew)
    runs = [first_losses(file, tmp_path, *changes.get(file, [])) for file in FILES]
    models, losses = zip(*runs, strict=True)
    assert len(set(losses)) == 1
    for model in models:
        changed = {n for n, value in model.state_dict().items() if not torch.equal(value.float(), given[n].float())}
        expected = r"synchronizer" if start == "fresh" else r"synchronizer\.gate|synchronizers\.\d+\.conv\."
        assert changed == {name for name in model.state_dict() if re.search(expected, name)}
    counts = [sum("synchronizer" in name for name, _ in model.named_parameters()) for model in models]
    assert counts[0] == counts[1] + counts[2]
    assert counts[3] == 0 < min(counts[1:3])


def test_what_is_fresh_has_to_be_there(tmp_path: Path) -> None:
    whole_model(tmp_path)
    file, source = ROOT / "configs/small/ablation_none.yaml", f"model.init_from.checkpoint={tmp_path}"
    with pytest.raises(ValueError, match=r"model\.weights: the pattern 'synchronizer' matches no parameter"):
        build(load_config(file, TrainConfig, [source, "model.weights=[{from: fresh, parameters: synchronizer}]"]))
    with pytest.raises(ConfigError, match=r"parameters '\[' is not a regular expression"):
        load_config(file, TrainConfig, [source, "model.weights=[{from: fresh, parameters: '['}]"])
    with pytest.raises(ConfigError, match=r"set init_from\.checkpoint or remove the entry \(model in .*debug.yaml"):
        load_config(ROOT / "configs/debug.yaml", TrainConfig, ["model.weights=[{from: fresh, parameters: gate}]"])


@pytest.fixture
def ablation(tmp_path: Path):
    script = module("scripts/ablate")
    options = argparse.Namespace(out=tmp_path / "out", work=tmp_path / "work", seconds=60, steps=8, device="cpu")
    return script, script.Ablation(options)


def checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def test_runs_are_compared_after_the_same_step(ablation, capsys) -> None:
    script, one = ablation
    shipped = {"shipped": Path("src/mm_interleaved/pretrained/small")}
    with pytest.raises(SystemExit, match="no step has a checkpoint of all four"):
        one.examined()
    for extra, name in enumerate(script.RUNS):
        for step in (2, 4, 5 + extra):
            checkpoint(one.work / name, step)
    (one.work / "none/final").mkdir()
    assert one.examined() == {name: one.work / name / "checkpoint-4" for name in script.RUNS} | shipped
    for name in script.RUNS:
        (one.work / name / "final").mkdir(exist_ok=True)
    assert one.examined() == {name: one.work / name / "final" for name in script.RUNS} | shipped
    assert "time was up" in capsys.readouterr().out


def test_the_table_has_what_was_measured(ablation) -> None:
    script, one = ablation
    for number, name in enumerate(script.RUNS):
        (one.work / name).mkdir()
        lines = [{"step": s, "loss_txt": 2.0 - s / 20, "loss_img": 0.5} for s in range(1, 21)]
        (one.work / name / "log.jsonl").write_text(
            "".join(f"{json.dumps(x)}\n" for x in [*lines, {"eval_loss_txt": 1}])
        )
        found = {"typed": {"where": 0.5 + number / 10, "n_where": 40}}
        if name != "none":  # whose exam was cut off
            (one.out / f"{name}.json").write_text(json.dumps(found))
    told = script.table(one.results()).splitlines()
    assert told[0] == "| MMFS in | both | UNet alone | language model alone | none | both, as it ships | of |"
    assert "| training loss, text, last tenth | 1.0250 | 1.0250 | 1.0250 | 1.0250 |  |  |" in told
    assert "| held-out loss, text | 1.0000 | 1.0000 | 1.0000 | 1.0000 |  |  |" in told
    assert '| questions "where" | 50.0% | 60.0% | 70.0% |  |  | 40 |' in told
    assert len(told) == 6
    assert len(json.loads((one.out / "losses.json").read_text())["full"]) == 21


def test_runs_are_stopped_in_time_and_failures_told(ablation, capsys) -> None:
    _, one = ablation
    one.options.at_once = 2
    one.together(one.left() - 1, {"full": ["sleep", "30"], "none": ["sh", "-c", "echo why; exit 3"]}, "train")
    assert one.left() > 50
    told = capsys.readouterr().out
    assert "none: train ended with 3" in told
    assert "full" not in told


def test_checkpoints_are_examined_with_their_average(tmp_path: Path) -> None:
    model = load("debug").model
    name, parameter = next(iter(model.named_parameters()))
    before = {n: p.clone() for n, p in model.named_parameters()}
    quality = module("benchmarks/quality.py")
    quality.averaged(tmp_path, model)
    assert torch.equal(parameter, before[name])
    save_file({name: before[name] + 1}, tmp_path / quality.AVERAGE)
    quality.averaged(tmp_path, model)
    assert all(torch.equal(p, before[n] + (n == name)) for n, p in model.named_parameters())
