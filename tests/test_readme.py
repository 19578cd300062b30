"""The examples of the README do what it says."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer.core
import typer.main

from mm_interleaved.cli import app, main
from mm_interleaved.document import load_documents

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [line[1:] for line in lines if line and line[0] == "mmi"]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own with the examples in it."""
    for folder in ("configs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_python(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, as a reader would type them."""
    names: dict[str, object] = {}
    for block in blocks("python"):
        if "127.0.0.1" in block:  # needs the server: tests/serving/test_docs.py
            continue
        exec(compile(block, "README.md", "exec"), names)
    said = capsys.readouterr().out
    assert re.search("[a-z]+.*5 segments", said)  # the text is printed while it is generated
    assert (elsewhere / "night.png").stat().st_size > 1000


def test_json(elsewhere: Path) -> None:
    for number, block in enumerate(blocks("json")):
        path = elsewhere / "examples" / f"readme{number}.json"
        path.write_text(json.dumps(json.loads(block)))
        assert load_documents(path)


def runs_elsewhere(command: list[str]) -> bool:
    """Needs large files, or does not end (`mmi serve`: tests/serving/)."""
    return bool(re.search(r"\bmodels\b|\bdownload\b|release_tasks|^serve\b", " ".join(command)))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [c for c in commands() if not runs_elsewhere(c)], ids=" ".join)
def test_commands(elsewhere: Path, arguments: list[str]) -> None:
    quick = {
        "generate": ["num_inference_steps=2", "max_new_tokens=8"],
        "bench": ["--only", "encode"],
        "data": ["--seconds", "1"],
        "train": ["steps=4", "sample_every=4"],
        "finetune": ["steps=1", "sample_every=0", "data.batch_size=1"] if len(arguments) > 1 else [],
    }
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, *quick.get(arguments[0], [])])
    assert not stopped.value.code
    if arguments[0] == "generate":
        folder = Path(arguments[arguments.index("--output") + 1])
        assert {"results.json", "report.html"} <= {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("arguments", [c for c in commands() if runs_elsewhere(c)], ids=" ".join)
def test_commands_that_need_large_files_have_such_arguments(arguments: list[str]) -> None:
    command = typer.main.get_command(app)
    with command.make_context("mmi", list(arguments)) as context:
        name, sub, rest = command.resolve_command(context, list(arguments))
        assert name == arguments[0]
        if isinstance(sub, typer.core.TyperGroup):  # `mmi data check`
            name, sub, rest = sub.resolve_command(context, rest)
        with contextlib.closing(sub.make_context(name, rest, parent=context)) as parsed:
            assert parsed.params


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) - {"and"} <= targets
    assert 'step "tests" make test\n' in (ROOT / ".ci" / "run").read_text()


def test_files_that_are_named_exist() -> None:
    source = ROOT / "src" / "mm_interleaved"
    named = re.findall(r"^\d\. `([\w/.]+)`", README, re.MULTILINE)
    assert len(named) == 5
    assert all((source / name).is_file() for name in named)
