"""An adapter that several processes train is that of one process with the same global batch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mm_interleaved.pretrained import load

from .conftest import logged, whole_model
from .test_distributed import SHARD, number, run_stand_in

FROZEN = "freeze=[vision,llm]"
# Both steps have an image loss: FSDP gives weights without a gradient one of 0, and then Adam's momentum moves them.
SETTINGS = [
    "--mixed", "adapter.rank=4", "losses.scale=global", "optimizer.lr=1e-2", "optimizer.eps=1e-4",
    "schedule.kind=constant", "schedule.warmup_steps=0", "precision=float32",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a debug model."""
    folder = tmp_path_factory.mktemp("base")
    whole_model(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["freeze=[]", FROZEN], ids=["all", "frozen parts"])
def test_processes_train_one_adapter(base: Path, tmp_path: Path, frozen: str) -> None:
    """Under DDP, and under FSDP2 with a resumption, on batches that need other parts of the model in every process."""
    origin = ["model.init_from.preset=null", f"model.init_from.checkpoint={base}", "adapter.preset=all", frozen]
    run_stand_in(tmp_path / "one", *SETTINGS, *origin, "steps=2", "accumulation=2")
    run_stand_in(tmp_path / "ddp", *SETTINGS, *origin, "steps=2", processes=2)
    for steps in ("steps=1", "steps=2"):  # the second run resumes from the sharded checkpoint of the first
        sharded = ["--shard", *SETTINGS, *origin, SHARD, "save_every=1", steps]
        said = run_stand_in(tmp_path / "fsdp", *sharded, processes=2)
        assert (tmp_path / "fsdp/checkpoint-1/adapter_config.json").is_file()
    assert "going on from" in said
    held, total = re.search(r"holds ([\d,]+) of all ([\d,]+) parameters", said).groups()
    assert number(held) < 0.6 * number(total)

    expected = load_file(tmp_path / "one/final/adapter_model.safetensors")
    assert any("image_decoder" in name for name in expected)
    assert any("visual_tokenizer" in name for name in expected) == (frozen != FROZEN)
    assert max(float(weight.abs().max()) for name, weight in expected.items() if "lora_B" in name) > 1e-2
    ids = torch.tensor([[1, 11, 12, 13]])
    logits = load(base, adapters=[tmp_path / "one/final"]).model(ids).logits
    for run in ("ddp", "fsdp"):
        assert list(logged(tmp_path / run).values()) == pytest.approx(list(logged(tmp_path / "one").values()), rel=1e-4)
        found = load_file(tmp_path / run / "final/adapter_model.safetensors")
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=f"{run}: {name}")
        tuned = load(base, adapters=[tmp_path / run / "final"]).model  # refuses an adapter that lacks a key
        torch.testing.assert_close(tuned(ids).logits, logits, rtol=1e-3, atol=1e-3)
