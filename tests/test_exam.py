"""The exam of the small model: its frozen files, intervals and table."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def module(name: str) -> ModuleType:
    """A file of `benchmarks`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


exam, quality = module("exam"), module("quality")


def test_the_test_is_the_frozen_one() -> None:
    changed = exam.changed_files()
    assert not changed, f"these make or score the exam: {changed}; if that is meant, run benchmarks/exam.py --freeze"


@pytest.mark.slow
def test_all_modules_that_make_and_score_the_test_are_frozen() -> None:
    """What `quality.py` uses of the toy world, and what that uses."""
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import quality; print([m.__file__ for m in sys.modules.values()"
    )
    code += " if m.__name__.startswith('toyworld') and m.__file__])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    used = {Path(path).resolve().relative_to(ROOT).as_posix() for path in eval(out)}
    assert used - exam.frozen_sums().keys() == {"src/toyworld/__init__.py"}


def test_changed_new_and_missing_files_are_named(tmp_path: Path) -> None:
    scene, score = tmp_path / "src/toyworld/scene.py", tmp_path / "src/toyworld/score.py"
    scene.parent.mkdir(parents=True)
    scene.write_text("a = 1\n")
    sums = tmp_path / "sums"
    sums.write_text(f"{hashlib.sha256(scene.read_bytes()).hexdigest()}  src/toyworld/scene.py\n")
    assert exam.changed_files(tmp_path, sums) == []
    score.write_text("b = 2\n")
    assert exam.changed_files(tmp_path, sums) == ["src/toyworld/score.py"]
    scene.write_text("a = 2\n")
    assert exam.changed_files(tmp_path, sums) == ["src/toyworld/scene.py", "src/toyworld/score.py"]
    scene.unlink()
    score.unlink()
    assert exam.changed_files(tmp_path, sums) == ["src/toyworld/scene.py"]


def test_rates_are_ratios_of_sums_with_intervals_over_samples() -> None:
    tally = quality.Tally()
    for right, asked in ((3, 4), (0, 0), (1, 1), (0, 5)):
        tally.add({"right": (right, asked), "never": (0, 0)})
    assert tally.rates() == {"right": 0.4}
    found = tally.result(questions=10)
    low, high = found["intervals"]["right"]
    assert 0 <= low < 0.4 < high <= 1
    assert found["right"] == 0.4
    assert found["questions"] == 10
    assert "never" not in found


def test_a_table_compares_models_with_the_goals() -> None:
    read = {"right": 0.9, "color": 0.5, "n_color": 40, "place": 0.1, "n_place": 3, "where": 0.7, "n_where": 30,
            "intervals": {"right": [0.85, 0.93], "color": [0.4, 0.6]}}  # fmt: skip
    drawn = {"extras": 0.281, "intervals": {"extras": [0.2, 0.35]}}
    lines = exam.table({"small": {"questions": read, "drawing": drawn}, "new": {}}).splitlines()
    assert "| questions | 90 (85 to 93) |  | 95 |" in lines
    assert "| questions of the worst type | 50 (40 to 60) |  | 85 |" in lines  # three questions are too few
    assert "| drawing: surplus objects for each asked for | 0.28 (0.20 to 0.35) |  | 0.03 |" in lines


def test_a_changed_test_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exam, "arguments", lambda: exam.argparse.Namespace(freeze=False, models=["small"]))
    monkeypatch.setattr(exam, "changed_files", lambda: ["src/toyworld/score.py"])
    with pytest.raises(SystemExit, match=r"score\.py changed\. Restore these files, or run"):
        exam.main()


@pytest.mark.slow
def test_one_command_asks_several_models(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/exam.py", "small", "debug", "--samples", "1", "--drawn", "1", "--steps", "1",
               "--split", "val", "--tasks", "captions", "drawing", "--output", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    header, _, first, *_ = (tmp_path / "table.md").read_text().splitlines()
    assert header == "| | small | debug | goal |"
    assert first.startswith("| captions: stated facts right | ")
    assert (tmp_path / "small/drawing.png").is_file()
