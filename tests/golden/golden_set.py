"""A folder of golden tensors, and the model that it describes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file
from torch import Tensor

from mm_interleaved.checkpoints.original import NameTable, config_from_original, derived_tensors
from mm_interleaved.generation import GenerationSettings, ImageSettings, MMInterleaved, TextSettings
from mm_interleaved.model import MMInterleavedConfig
from mm_interleaved.processor import Batch

from ..conftest import GOLDEN_ERRORS, golden_bytes, golden_identity

EPSILON = torch.finfo(torch.float32).eps


def kind(name: str) -> Callable:
    """Marks the test that runs the cases of a kind."""

    def mark(function: Callable) -> Callable:
        function.kind = name
        return function

    return mark


RENAMED = {
    "max_length": ("text", "max_new_tokens"),
    "num_beams": ("text", "num_beams"),
    "use_nucleus_sampling": ("text", "do_sample"),
    "top_p": ("text", "top_p"),
    "temperature": ("text", "temperature"),
    "repetition_penalty": ("text", "repetition_penalty"),
    "length_penalty": ("text", "length_penalty"),
    "num_captions": ("text", "num_return_sequences"),
    "num_inference_steps": ("image", "num_inference_steps"),
    "guidance_scale": ("image", "guidance_scale"),
    "num_validation_images": ("image", "num_candidates"),
}
"""By argument of the original's generation: the part of the settings and the setting."""


def from_original(**arguments: Any) -> GenerationSettings:
    """The settings that the original's generation arguments mean. Its `min_length` counts `<s>`."""
    chosen: dict[str, dict[str, Any]] = {"text": {}, "image": {}}
    for name, value in arguments.items():
        part, ours = ("text", "min_new_tokens") if name == "min_length" else RENAMED[name]
        chosen[part][ours] = max(value - 1, 0) if name == "min_length" else value
    return GenerationSettings(TextSettings(**chosen["text"]), ImageSettings(**chosen["image"]))


class CaseTensors(dict[str, Tensor]):
    """The tensors of a case; remembers which were read by name, so that none is left out of the comparison."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def leave(self, pattern: str) -> None:
        """Expected tensors that another form of the same test compares."""
        self.read |= {name for name in self if re.fullmatch(f"out\\.({pattern})", name)}

    def unread(self) -> list[str]:
        """Expected tensors that nothing asked for."""
        return sorted(name for name in self if name.startswith("out.") and name not in self.read)


class GoldenSet:
    """Reads everything from the folder; nothing is tied to one set.

    Args:
        folder: of the set.
        committed: whether errors are also held against `errors.json`, if that was written for this set.
    """

    def __init__(self, folder: Path, committed: bool = True) -> None:
        self.folder = folder
        self.opened: dict[str, CaseTensors] = {}
        self.report: list[tuple[str, str, float, float, float | None]] = []  # one row per tensor
        self.description = json.loads((folder / "config.json").read_text())
        self.cases = json.loads((folder / "cases.json").read_text())
        noise = folder / "cases" / "noise_levels.json"
        self.noise = json.loads(noise.read_text()) if noise.exists() else {}
        table = json.loads(GOLDEN_ERRORS.read_text()) if committed and GOLDEN_ERRORS.exists() else {"set": None}
        self.committed = table["errors"] if table["set"] == golden_identity(folder) else None

    @cached_property
    def config(self) -> MMInterleavedConfig:
        return config_from_original(self.description)

    @cached_property
    def names(self) -> NameTable:
        return NameTable(self.config)

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """The original's, in float32."""
        tensors = load(golden_bytes(self.folder / "state_dict.safetensors"))
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

    def tensors(self, case: str) -> CaseTensors:
        self.opened[case] = CaseTensors(load(golden_bytes(self.folder / "cases" / self.cases[case]["file"])))
        return self.opened[case]

    def check_nothing_was_left_out(self) -> None:
        """Assert that every expected tensor of the cases opened so far was read."""
        for case, tensors in self.opened.items():
            assert not tensors.unread(), f"{case}: nothing compares {', '.join(tensors.unread())}"

    def pixels(self, index: Tensor, pool: str = "pool224") -> Tensor:
        return self.pool[pool][index].float() / 255

    def batch(self, x: dict[str, Tensor]) -> Batch:
        """A case's prompts."""
        counts, mask = x["in.num_image_per_seq"], x["in.attention_mask"]
        return Batch(
            input_ids=x["in.text_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            pixel_values=self.pixels(x["in.image_idx"]),
            image_rows=torch.arange(len(counts)).repeat_interleave(counts),
            document_starts=torch.zeros(int(counts.sum()), dtype=torch.long),
        )

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
        assert torch.isfinite(measured).all(), f"{name} is not finite"
        self.record(case, name, float(error.max()), float(allowed.flatten()[worst]), float(expected.abs().max()))
        assert (error <= allowed).all(), f"{name}: error {float(error.max()):.2e}"

    def record(self, case: str, name: str, error: float, allowed: float, scale: float = 1.0) -> None:
        """Put an error into the table, and assert that it is at most twice the committed one.

        An error that the original has itself (its noise level), or of one rounding of the largest value, may be there.

        Args:
            case, name: of the tensor.
            error: the largest one.
            allowed: by the set's tolerances, for the table.
            scale: the largest expected value.
        """
        noise = self.noise.get(case, {}).get(name)
        self.report.append((case, name, error, allowed, noise))
        if self.committed is None:
            return
        assert name in self.committed.get(case, {}), f"{case}: {name} is not in errors.json; see tests/golden/README.md"
        before = self.committed[case][name]
        assert error <= max(2 * before, noise or 0.0, EPSILON * scale), (
            f"{case}: error of {name} was {before:.1e} and is now {error:.1e}; if that is meant, write errors.json "
            "anew (tests/golden/README.md)"
        )

    def close_stats(self, case: str, name: str, measured: Tensor, expected: Tensor) -> None:
        """Mean, deviation, largest value and norm of a tensor that is too large to keep."""
        x = measured.double()
        self.close(case, name, torch.stack([x.mean(), x.std(), x.abs().max(), x.norm()]), expected)


def strided(full: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """A map at the stride of a stored sub-sample, and that sub-sample."""
    stride = full.shape[-1] // expected.shape[-1]
    return full[..., ::stride, ::stride], expected


@pytest.fixture(scope="session")
def golden_set(pytestconfig: pytest.Config) -> GoldenSet:
    return GoldenSet(Path(pytestconfig.getoption("--golden-dir")), not pytestconfig.getoption("--write-golden-errors"))


@pytest.fixture
def golden(golden_set: GoldenSet, record_property: Callable[[str, object], None]) -> Iterator[GoldenSet]:
    """The set; what a test measures goes into the table at the end of the run, from whatever process it runs in."""
    golden_set.report, golden_set.opened = [], {}
    yield golden_set
    record_property("golden", golden_set.report)
