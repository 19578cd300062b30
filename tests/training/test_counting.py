"""`losses.scale: global`: a step is the same however its rows are divided; and every process has a loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mm_interleaved.pretrained import load

from ..conftest import awaken
from ..programs import run_together
from . import steps

GLOBAL = "losses.scale=global"


def alone(kind: str, rows: int, folder: Path, *settings: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Trained weights after a step of one process, and what it logged."""
    accumulation = len(steps.KINDS[kind]) // rows
    model, trainer = steps.step(kind, rows, [f"accumulation={accumulation}", *settings], folder)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, trainer.state.log_history[0]


def together(kind: str, rows: int, folder: Path, *settings: str) -> dict[str, Tensor]:
    """Trained weights after a step of two processes."""
    accumulation = len(steps.KINDS[kind]) // rows // 2
    output = folder / "weights.safetensors"
    given = (str(output), kind, str(rows), f"accumulation={accumulation}", *settings)
    well, said = run_together(2, "tests.training.steps", *given, OMP_NUM_THREADS="1")
    assert well, said[-3000:]
    return load_file(output)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    before = awaken(load("debug").model).state_dict()
    assert max(float((expected[n] - before[n]).abs().max()) for n in expected) > 0.1
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=2e-6, msg=name)


def test_accumulation_is_one_large_batch(tmp_path: Path) -> None:
    expected, whole = alone("unequal", 8, tmp_path, GLOBAL)
    for rows in (4, 1):
        found, logged = alone("unequal", rows, tmp_path, GLOBAL)
        compare(found, expected)
        for name in ("loss", "loss_txt", "loss_img"):
            assert logged[name] == pytest.approx(whole[name], rel=1e-5), (rows, name)


def test_means_over_batches_differ(tmp_path: Path) -> None:
    """The release's: otherwise the tests here would show nothing."""
    expected, _ = alone("unequal", 8, tmp_path)
    found, _ = alone("unequal", 1, tmp_path)
    assert max(float((found[n] - expected[n]).abs().max()) for n in expected) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", steps.KINDS)
def test_two_processes_are_one_large_batch(tmp_path: Path, kind: str) -> None:
    """Also where one of them has no image, no image loss or no text to learn."""
    expected, _ = alone(kind, 8, tmp_path, GLOBAL)
    compare(together(kind, 4, tmp_path, GLOBAL), expected)
    compare(together(kind, 2, tmp_path, GLOBAL), expected)
