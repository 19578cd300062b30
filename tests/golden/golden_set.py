"""A folder of golden tensors, and the model that it describes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mm_interleaved.generation import MMInterleaved
from mm_interleaved.model import MMInterleavedConfig
from mm_interleaved.model.original import NameTable, config_from_original, derived_tensors


class GoldenSet:
    """Reads everything from the folder; nothing is tied to one set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.report: list[tuple[str, str, float, float, float | None]] = []  # one row per tensor
        self.description = json.loads((folder / "config.json").read_text())
        self.cases = json.loads((folder / "cases.json").read_text())
        noise = folder / "cases" / "noise_levels.json"
        self.noise = json.loads(noise.read_text()) if noise.exists() else {}

    @cached_property
    def config(self) -> MMInterleavedConfig:
        return config_from_original(self.description)

    @cached_property
    def names(self) -> NameTable:
        return NameTable(self.config)

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """The original's, in float32."""
        tensors = load_file(self.folder / "state_dict.safetensors")
        return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}

    @cached_property
    def model(self) -> MMInterleaved:
        model = MMInterleaved(self.config)
        derived = derived_tensors(self.config)
        model.load_state_dict({self.names.ours(k): v for k, v in self.state_dict.items() if k not in derived})
        return model

    @cached_property
    def pool(self) -> dict[str, Tensor]:
        return load_file(self.folder / "cases" / "image_pool.safetensors")

    def tensors(self, case: str) -> dict[str, Tensor]:
        return load_file(self.folder / "cases" / self.cases[case]["file"])

    def pixels(self, index: Tensor, pool: str = "pool224") -> Tensor:
        return self.pool[pool][index].float() / 255

    def close(self, case: str, name: str, measured: Tensor, expected: Tensor, where: Tensor | None = None) -> None:
        """Assert that `measured` is within the case's tolerance; integers must be equal."""
        assert measured.shape == expected.shape, f"{name}: {tuple(measured.shape)} != {tuple(expected.shape)}"
        if where is not None:
            measured, expected = measured[where], expected[where]
        if not expected.is_floating_point():
            assert torch.equal(measured.to(expected.dtype), expected), f"{name} differs"
            return
        tolerance = self.cases[case]["tolerance"]
        error = (measured.detach().double() - expected.double()).abs()
        allowed = tolerance["atol"] + tolerance["rtol"] * expected.double().abs()
        worst = int((error - allowed).argmax()) if error.numel() else 0
        self.report.append(
            (case, name, float(error.max()), float(allowed.flatten()[worst]), self.noise.get(case, {}).get(name))
        )
        assert torch.isfinite(measured).all(), f"{name} is not finite"
        assert (error <= allowed).all(), f"{name}: error {float(error.max()):.2e}"

    def close_stats(self, case: str, name: str, measured: Tensor, expected: Tensor) -> None:
        """Mean, deviation, largest value and norm of a tensor that is too large to keep."""
        x = measured.double()
        self.close(case, name, torch.stack([x.mean(), x.std(), x.abs().max(), x.norm()]), expected)


@pytest.fixture(scope="session")
def golden_set(pytestconfig: pytest.Config) -> GoldenSet:
    return GoldenSet(Path(pytestconfig.getoption("--golden-dir")))


@pytest.fixture
def golden(golden_set: GoldenSet, record_property: Callable[[str, object], None]) -> Iterator[GoldenSet]:
    """The set; what a test measures goes into the table at the end of the run, from whatever process it runs in."""
    golden_set.report = []
    yield golden_set
    record_property("golden", golden_set.report)
