"""What docs/guides/evaluation.md shows works."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
import yaml

from mm_interleaved.cli import app
from mm_interleaved.configuration import load_config
from mm_interleaved.evaluation.scoring import METRICS
from mm_interleaved.tasks.prepare import CONVERTERS
from mm_interleaved.training.config import TrainConfig

from ..cli.conftest import Outcome, mmi

__all__ = ["mmi"]
ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/guides/evaluation.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^    (?:mmi) (.*)$", TEXT, re.MULTILINE)]


def test_one_after_the_other(mmi: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """As a reader would type them; those about the real files find nothing here, and say so."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "first.yaml").write_text(EXAMPLES["first.yaml"])
    for command in COMMANDS:
        extra = ["--workers", "1"] if command[0] == "toyworld" else []
        if command[0] == "evaluate":
            extra = ["--device", "cpu", "--overwrite"]
        said = mmi(*command, *extra)
        real = command[0] == "data" and "first.yaml" not in command
        assert said.code == int(real), said.err
        if real:
            assert "does not exist" in said.out + said.err
    assert (tmp_path / "runs/first/vqav2/gallery.html").is_file()
    exec(compile(EXAMPLES["python"], "docs/guides/evaluation.md", "exec"), {"__name__": "example"})
    assert float(capsys.readouterr().out.split()[-1]) >= 0


def test_the_other_commands_exist() -> None:
    evaluate = typer.main.get_command(app).commands["evaluate"]  # type: ignore[attr-defined]
    assert {"--device", "--overwrite"} <= {o for p in evaluate.params for o in p.opts}
    assert len(COMMANDS) == 9
    assert "torchrun --nproc-per-node=2 -m mm_interleaved.cli evaluate first.yaml" in TEXT


def test_tasks_of_a_training_run(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(evaluate_every.*?)```", TEXT, re.DOTALL)
    debug = yaml.safe_load((ROOT / "configs/debug.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**debug, **yaml.safe_load(text)}))
    assert load_config(tmp_path / "run.yaml", TrainConfig).evaluate_every == 1000


def test_every_metric_is_listed() -> None:
    lines = [line for line in TEXT.split("## What metrics need")[1].split("##")[0].splitlines() if line[:3] == "| `"]
    assert {name for line in lines for name in re.findall(r"`(\w+)`", line.split("|")[1])} == set(METRICS)
    for name in ("TextVQA", "VIST", "ADE20K", "FlintstonesSV", "Flickr30k", "Image2Paragraph"):
        assert name in " ".join(TEXT.split()).split("`mmi data prepare` converts")[1].split("##")[0]
    assert len(CONVERTERS) == 10
