"""What docs/guides/training.md shows is true: commands exist, files are there, and its YAML is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mm_interleaved.cli import app
from mm_interleaved.configuration import load_config
from mm_interleaved.training.config import TrainConfig

from .conftest import ROOT

TEXT = (ROOT / "docs/guides/training.md").read_text()
_COMMAND = r"^    (?:torchrun .* -m mm_interleaved\.cli|mmi) (train) (\S+)(.*?)(?:\s+#.*)?$"
COMMANDS = re.findall(_COMMAND, TEXT, re.MULTILINE)
YAML = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_name_files_that_can_be_read(command: tuple[str, str, str]) -> None:
    name, path, rest = command
    assert CliRunner().invoke(app, [*name.split(), "--help"]).exit_code == 0
    load_config(ROOT / path, TrainConfig, rest.split())


@pytest.mark.parametrize("text", YAML)
def test_yaml_is_accepted(text: str, tmp_path: Path) -> None:
    debug = yaml.safe_load((ROOT / "configs/debug.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**debug, **yaml.safe_load(text)}))
    load_config(tmp_path / "run.yaml", TrainConfig)


@pytest.mark.slow
def test_the_training_loop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"<!-- example: loop -->\n```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(code, "docs/guides/training.md", "exec"), {"__name__": "example"})
    losses = capsys.readouterr().out.split()[-2:]
    assert [float(loss) > 0 for loss in losses] == [True, True]


def test_the_page_shows_something() -> None:
    assert len(COMMANDS) >= 4
    assert len(YAML) >= 6
