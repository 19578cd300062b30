"""What docs/guides/adapters.md shows is true."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from mm_interleaved.adapters.targets import PRESETS
from mm_interleaved.cli import app
from mm_interleaved.configuration import make_config, read_settings
from mm_interleaved.pretrained import MODELS
from mm_interleaved.training.config import TrainConfig

from .make_adapter import make

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/guides/adapters.md").read_text()
FOLDER = "runs/finetune/vqa/final"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines()])
def test_commands_have_these_options(line: str) -> None:
    _, name, *words = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]
    assert {word for word in words if word.startswith("--")} <= {option for p in command.params for option in p.opts}


def test_settings_are_accepted(tmp_path: Path) -> None:
    settings = read_settings(ROOT / "configs/debug.yaml")
    for number, block in enumerate(blocks("yaml")):
        (tmp_path / f"{number}.yaml").write_text(block)
        settings |= read_settings(tmp_path / f"{number}.yaml")
    settings["model"] = {"init_from": {"checkpoint": str(MODELS["small"])}}
    adapter = make_config(settings, TrainConfig).adapter
    assert adapter is not None
    assert (adapter.preset, adapter.rank, adapter.alpha) == ("llm", 16, 32)
    assert set(re.findall(r"^\| `(\w+)` \| ", TEXT, re.MULTILINE)) == set(PRESETS)


def test_the_code_runs(tmp_path: Path) -> None:
    make(MODELS["small"], tmp_path / "adapter", preset="llm")
    (code,) = blocks("python")
    assert FOLDER in code
    names: dict[str, object] = {}
    exec(code.replace(FOLDER, str(tmp_path / "adapter")), names)
    assert not hasattr(names["loaded"].model, "peft_config")
    assert list(names["model"].peft_config) == ["vqa"]
