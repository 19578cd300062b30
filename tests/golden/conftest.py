"""Makes one test of every case of the golden folder."""

from __future__ import annotations

import json
from collections.abc import Generator
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


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    result = yield
    if (used := pyfuncitem.funcargs.get("golden")) is not None:  # a tensor that no test knows must not pass unseen
        used.check_nothing_was_left_out()
    return result
