"""What docs/guides/inspection.md shows works."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mm_interleaved.inspection import load_inspection

from ..cli.conftest import Outcome, mmi

__all__ = ["mmi"]
ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/guides/inspection.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = [shlex.split(line) for line in re.findall(r"^    mmi (.*)$", TEXT, re.MULTILINE)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(EXAMPLES["inspect.py"], "docs/guides/inspection.md", "exec"), {"__name__": "example"})
    shapes = capsys.readouterr().out.splitlines()[1:3]
    assert [shape.count(",") for shape in shapes] == [5, 5]
    assert (place / "inspection" / "inspection.html").is_file()


@pytest.mark.parametrize("number", range(3))
def test_commands(mmi: Callable[..., Outcome], place: Path, number: int) -> None:
    command = COMMANDS[number]
    assert len(COMMANDS) == 3
    extra = ["--cells", "4"] if "--cells" not in command else []
    said = mmi(*command, *extra, "--device", "cpu")
    assert said.code == 0, said.err
    found = load_inspection(command[command.index("--output") + 1])
    assert all(record.images for record in found.texts)


def test_figures_are_those_of_the_results() -> None:
    found = json.loads((ROOT / "benchmarks/results/inspection.json").read_text())
    assert found["questions"] == 200
    table = dict(re.findall(r"^\| (points on the asked object|right answers) \|.*\| ([^|]*) \|$", TEXT, re.MULTILINE))
    assert table["right answers"] == f"{100 * found['right']:.1f} %"
    low, high = (100 * side for side in found["hits_interval"])
    assert table["points on the asked object"] == f"{100 * found['hits']:.1f} % ({low:.1f} to {high:.1f} %)"
