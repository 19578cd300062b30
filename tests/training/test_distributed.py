"""Several processes do what one does with more accumulation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mm_interleaved.training.checkpoints import find_damage

from ..programs import run_together
from .conftest import ROOT, arguments, logged
from .stand_in import COLORS

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
SHARD = "fsdp={fsdp_version: 2}"
FROZEN = r"['image_decoder\.vae', 'language_model\.layers\.0', 'language_model\.embed', 'image_decoder\.unet\.down']"

OTHERWISE = [
    "precision=bfloat16", "gradient_checkpointing=true", "accumulation=2", f"model.overrides.frozen={FROZEN}"
]  # fmt: skip


def run_stand_in(run: Path, *changes: str, processes: int = 1, succeeds: bool = True) -> str:
    """A run of `stand_in` with these settings; what it said."""
    given = arguments(run, "log_every=1", "save_every=0", *changes)
    well, said = run_together(processes, "tests.training.stand_in", *given, **ENVIRONMENT)
    assert well == succeeds, said[-3000:]
    return said


def run_by_torchrun(*command: str) -> None:
    """Run a module in two processes as a user starts them."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", *command]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(launch, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def number(written: str) -> int:
    return int(written.replace(",", ""))


@pytest.mark.slow
def test_two_processes_learn_like_one_that_accumulates(tmp_path: Path) -> None:
    run_stand_in(tmp_path / "one", "steps=4", "accumulation=2")
    settings = arguments(tmp_path / "two", "log_every=1", "save_every=0", "steps=4")
    run_by_torchrun("tests.training.stand_in", *settings)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert list(one) == list(two) == [1, 2, 3, 4]
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
    a, b = (load_file(tmp_path / run / "final/model.safetensors") for run in ("one", "two"))
    # Adam turns rounding into steps where gradients are nearly 0, so hardly any weight may differ, and by little.
    apart = [float((a[n] - b[n]).abs().max()) for n in a]
    assert max(apart) < 4 * 1e-3
    assert sum(x > 1e-4 for x in apart) < 0.2 * len(apart)
    assert len(COLORS) == 8


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "close"), [([], 1e-3), (OTHERWISE, 5e-3)], ids=["plain", "otherwise"])
def test_sharded_parameters_learn_the_same(tmp_path: Path, settings: list[str], close: float) -> None:
    """On batches that need other parts of the model in every process."""
    run_stand_in(tmp_path / "ddp", "--mixed", "steps=4", *settings, processes=2)
    settings = ["--mixed", "--shard", "steps=4", "save_every=2", SHARD, *settings]
    said = run_stand_in(tmp_path / "whole", *settings, processes=2)
    held, total = re.search(r"holds ([\d,]+) of all ([\d,]+) parameters", said).groups()
    assert number(held) < 0.6 * number(total)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped", ignore=shutil.ignore_patterns("checkpoint-4", "final"))
    run_stand_in(tmp_path / "stopped", *settings, processes=2)

    ddp, whole, stopped = (logged(tmp_path / run) for run in ("ddp", "whole", "stopped"))
    assert list(whole) == [1, 2, 3, 4]
    assert list(whole.values()) == pytest.approx(list(ddp.values()), rel=close)
    assert stopped == whole
    ddp, whole, stopped = (load_file(tmp_path / run / "final/model.safetensors") for run in ("ddp", "whole", "stopped"))
    assert {n: (w.shape, w.dtype) for n, w in whole.items()} == {n: (w.shape, w.dtype) for n, w in ddp.items()}
    for name, weight in whole.items():
        assert torch.equal(weight, stopped[name]), name
        torch.testing.assert_close(weight, ddp[name], rtol=0, atol=close)


@pytest.mark.slow
def test_fsdp_does_not_silently_become_something_else(tmp_path: Path) -> None:
    for settings, message in (
        ([SHARD], "every process would hold all parameters"),
        (["--shard", "fsdp={state_dict_type: SHARDED_STATE_DICT}"], "fsdp.state_dict_type must be FULL_STATE_DICT"),
    ):
        assert message in run_stand_in(tmp_path / "run", *settings, processes=2, succeeds=False)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_out_parameters(tmp_path: Path) -> None:
    for run, settings in (("ddp", []), ("fsdp", [SHARD, "save_every=2"])):
        given = arguments(tmp_path / run, "log_every=1", "save_every=0", "steps=4", *settings)
        run_by_torchrun("tests.training.stand_in", "--mixed", "--gpu", *given)
    ddp, fsdp = logged(tmp_path / "ddp"), logged(tmp_path / "fsdp")
    assert list(fsdp.values()) == pytest.approx(list(ddp.values()), rel=1e-3)
    assert all(torch.isfinite(w).all() for w in load_file(tmp_path / "fsdp/final/model.safetensors").values())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed")
def test_deepspeed_learns_the_same_and_goes_on(tmp_path: Path) -> None:
    settings = ["schedule.kind=constant", f"deepspeed={ROOT / 'configs/deepspeed/zero1.json'}"]
    run_stand_in(tmp_path / "ddp", "steps=4", "schedule.kind=constant", processes=2)
    run_stand_in(tmp_path / "whole", "steps=4", "save_every=2", *settings, processes=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped", ignore=shutil.ignore_patterns("checkpoint-4", "final"))
    run_stand_in(tmp_path / "stopped", "steps=4", "save_every=2", *settings, processes=2)
    assert list(logged(tmp_path / "whole").values()) == pytest.approx(list(logged(tmp_path / "ddp").values()), rel=1e-4)
    ddp, whole, stopped = (load_file(tmp_path / run / "final/model.safetensors") for run in ("ddp", "whole", "stopped"))
    for name, weight in whole.items():
        assert torch.equal(weight, stopped[name]), name
        torch.testing.assert_close(weight, ddp[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_recorded_steps_are_averaged_over_processes() -> None:
    well, said = run_together(2, "tests.training.averages", **ENVIRONMENT)
    assert well, said[-3000:]


SHARDED = [
    "--mixed", "schedule.kind=constant", "save_every=1", "sample_every=2", "ema.decay=0.5", "async_checkpoints=true",
    "precision=float32", SHARD,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "warm_up", "close"), [("adamw", 5, 1e-3), ("muon", 0, 1e-5)])
def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path: Path, kind: str, warm_up: int, close: float) -> None:
    """Two processes with FSDP, then one, then two: curve, weights and samples are those of two without a break."""
    settings = [*SHARDED, f"optimizer.kind={kind}", f"schedule.warmup_steps={warm_up}"]
    run_stand_in(tmp_path / "whole", *settings, "--shard", "steps=3", processes=2)
    run_stand_in(tmp_path / "parts", *settings, "--shard", "steps=1", processes=2)
    run_stand_in(tmp_path / "parts", *settings, "steps=2", "accumulation=2")
    assert not (tmp_path / "parts/checkpoint-2/model.safetensors").exists()
    run_stand_in(tmp_path / "parts", *settings, "--shard", "steps=3", processes=2)
    whole, parts = logged(tmp_path / "whole"), logged(tmp_path / "parts")
    assert list(parts) == list(whole) == [1, 2, 3]
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=1e-4)
    texts = [(tmp_path / run / "samples/0000002.txt").read_text() for run in ("whole", "parts")]
    assert texts[0] == texts[1]
    whole, parts = (load_file(tmp_path / run / "final/model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(weight, parts[name], rtol=0, atol=close)


@pytest.mark.slow
def test_evaluation_and_samples_change_no_sharded_run(tmp_path: Path) -> None:
    """They gather weights without a backward pass; checkpoints that follow them are complete."""
    settings = ["--mixed", "--shard", "steps=4", "ema.decay=0.5", "precision=float32", SHARD]
    run_stand_in(tmp_path / "plain", *settings, processes=2)
    watching = [*settings, "eval_data=${data}", "eval_every=1", "sample_every=2", "save_every=2"]
    run_stand_in(tmp_path / "watched", *watching, processes=2)
    later = shutil.ignore_patterns("checkpoint-4", "final")
    shutil.copytree(tmp_path / "watched", tmp_path / "resumed", ignore=later)
    run_stand_in(tmp_path / "resumed", *watching, processes=2)
    assert len(logged(tmp_path / "watched", "eval_loss")) == 4
    assert (tmp_path / "watched/samples/0000004.txt").is_file()
    plain = logged(tmp_path / "plain")
    assert list(plain) == [1, 2, 3, 4]
    weights = load_file(tmp_path / "plain/final/model.safetensors")
    for run in ("watched", "resumed"):
        assert logged(tmp_path / run) == plain
        found = load_file(tmp_path / run / "final/model.safetensors")
        assert [name for name, weight in weights.items() if not torch.equal(weight, found[name])] == []


@pytest.mark.parametrize("background", ["", "background"])
def test_divided_weights_are_updated_and_saved_like_whole_ones(tmp_path: Path, background: str) -> None:
    """By both optimizers; what two processes have written, one reads, and then two again."""
    for processes, command in ((1, "alone"), (2, "write"), (1, "read"), (2, "read")):
        well, said = run_together(processes, "tests.training.divided", command, tmp_path, background, **ENVIRONMENT)
        assert well, said[-3000:]
    assert find_damage(tmp_path / "checkpoint-2") == ""
