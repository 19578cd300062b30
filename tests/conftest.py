"""Options, fixtures and the table of golden errors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched; the download test brings its own hub
GOLDEN_DATA = Path(__file__).parent / "golden" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", default=str(GOLDEN_DATA), help="folder of golden tensors (tests/golden/README.md)")


def pytest_configure(config: pytest.Config) -> None:
    config.golden_rows = []
    torch.set_num_threads(int(os.environ.get("MMI_TEST_THREADS", "2")))


def pytest_terminal_summary(terminalreporter) -> None:
    rows = terminalreporter.config.golden_rows
    if not rows:
        return
    terminalreporter.section("golden parity: largest error of every tensor")
    terminalreporter.write_line(f"{'case':44} {'tensor':52} {'error':>9} {'allowed':>9} {'float32 noise':>13}")
    for case, name, error, allowed, noise in rows:
        floor = "-" if noise is None else f"{noise:.1e}"
        terminalreporter.write_line(f"{case:44} {name:52} {error:9.1e} {allowed:9.1e} {floor:>13}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
