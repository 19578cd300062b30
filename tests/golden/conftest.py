"""Makes one test of every case of the golden folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .golden_set import golden, golden_set  # noqa: F401


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    folder = Path(metafunc.config.getoption("--golden-dir"))
    if not (folder / "cases.json").is_file():
        raise pytest.UsageError(f"--golden-dir {folder} has no cases.json")
    cases = json.loads((folder / "cases.json").read_text())
    kind = metafunc.function.kind
    metafunc.parametrize("case", [name for name, case in cases.items() if case["kind"] == kind])
