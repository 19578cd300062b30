"""What docs/reference/tasks.md shows works, and what it lists is what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mm_interleaved.cli import main
from mm_interleaved.tasks import TASKS, TaskConfig, make_task
from toyworld.writers import write_dataset
from toyworld.writers.base import Job

from ..conftest import make_image

TEXT = (Path(__file__).parents[2] / "docs/reference/tasks.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = re.findall(r"^    mmi (.*)$", TEXT, re.MULTILINE)


def run(name: str) -> None:
    exec(compile(EXAMPLES[name], "docs/reference/tasks.md", "exec"), {"__name__": "example"})


def test_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Files lie as in the documented tree."""
    write_dataset("vqav2", tmp_path / "datasets/VQAv2", Job(2, "val", 0, 48))
    (tmp_path / "datasets/coco").symlink_to("VQAv2")
    monkeypatch.chdir(tmp_path)
    run("use")
    assert "20000010 [" in capsys.readouterr().out


def test_a_task_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TASKS, "_values", {})
    run("own")
    (tmp_path / "jokes/images").mkdir(parents=True)
    make_image().save(tmp_path / "jokes/images/a.png")
    lines = [{"image": "a.png", "joke": "it is"}, {"image": "b.png", "joke": "it was"}]
    (tmp_path / "jokes/jokes_val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = make_task(TaskConfig("jokes", root=str(tmp_path)))
    found = list(task.samples())
    assert [s.document.segments[1].text for s in found] == ["This is funny because"] * 2
    assert [s.reference for s in found] == [["it is"], ["it was"]]
    assert [bool(s.problem) for s in found] == [False, True]
    assert [s.supervise for s in next(task.documents()).segments] == [False, False, True]


def test_toy_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) == 2
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([*command.replace("-n 100", "-n 2").split(), "--workers", "1"])
        assert not stopped.value.code
    run("toy")
    assert "Based on the image" in capsys.readouterr().out


def test_everything_is_listed() -> None:
    """Tasks, their phases and options."""
    table = [line for line in TEXT.splitlines() if line.startswith("| `")]
    listed = {name for line in table for name in re.findall(r"`([\w+]+)`", line.split("|")[1])}
    assert listed == set(TASKS)
    for line in table:
        for name in re.findall(r"`([\w+]+)`", line.split("|")[1]):
            assert all(phase in line for phase in TASKS[name].phases)
            assert all(option in line for option in TASKS[name].options)
