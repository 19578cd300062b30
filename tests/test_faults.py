"""The planted faults (`scripts/plant_faults.py`) fit the code as it is; planting all takes minutes."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plant_faults", ROOT / "scripts/plant_faults.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["plant_faults"] = module  # dataclasses look there for their module
    spec.loader.exec_module(module)
    return module


def test_every_fault_applies(script: ModuleType) -> None:
    """Once each, to code that still compiles; their tests exist."""
    faults, trouble = script.load_faults(), []
    assert len(faults) >= 30
    assert sum(fault.core for fault in faults) >= 10
    assert len({fault.name for fault in faults}) == len(faults)
    for fault in faults:
        try:
            compile(fault.planted((ROOT / "src/mm_interleaved" / fault.file).read_text()), fault.file, "exec")
        except (ValueError, SyntaxError, OSError) as error:
            trouble.append(f"{fault.name}: {error}")
        for test in fault.tests:
            path, _, name = test.partition("::")
            if not re.search(rf"^def {name or 'test_'}", (ROOT / path).read_text(), re.MULTILINE):
                trouble.append(f"{fault.name}: there is no test {test}")
    assert not trouble, "\n".join(trouble)


@pytest.mark.slow
def test_what_came_of_a_fault(script: ModuleType, tmp_path: Path) -> None:
    """Caught, missed, or broken, as the tests end; the code is as it was afterwards."""
    code = tmp_path / "src/mm_interleaved/sums.py"
    code.parent.mkdir(parents=True)
    code.write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "test_sums.py").write_text(
        "import runpy\n\ndef test_one_and_one():\n"
        "    assert runpy.run_path('src/mm_interleaved/sums.py')['add'](2, 1) == 3\n"
    )

    def outcome(new: str, old: str = "a + b", tests: str = "test_sums.py") -> tuple[str, str]:
        return script.plant(tmp_path, script.Fault("sum", "sums.py", old, new, "", [tests]), [])

    assert outcome("a - b") == ("caught", "test_sums.py::test_one_and_one")
    assert outcome("b + a")[0] == "missed"
    assert outcome("a - b", tests="test_gone.py")[0] == "broken"
    assert outcome("a - b", old="a * b") == (
        "broken", "sum: its text occurs 0 times in sums.py; mend it in tests/faults.toml"
    )  # fmt: skip
    assert code.read_text() == "def add(a, b):\n    return a + b\n"
