"""The files of `examples/` for deployment fit the program."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main

from mm_interleaved.cli import app

ROOT = Path(__file__).parents[1]
CONTAINER = (ROOT / "examples/Containerfile").read_text()
UNIT = (ROOT / "examples/mmi.service").read_text()


def check_serve(arguments: list[str]) -> None:
    """The command line is one that `mmi serve` takes."""
    assert arguments[0].endswith("mmi")
    assert arguments[1] == "serve"
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    with command.make_context("serve", arguments[2:]) as context:
        assert context.params["model"] == "small"


def test_the_container_runs_a_command_that_exists() -> None:
    lists = dict(re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", CONTAINER, re.MULTILINE))
    check_serve([*json.loads(lists["ENTRYPOINT"]), *json.loads(lists["CMD"])])
    user = re.search(r"^USER (\d+)$", CONTAINER, re.MULTILINE)
    assert user is not None
    assert int(user[1]) > 0
    assert f"--uid {user[1]}" in CONTAINER


def test_the_container_copies_what_there_is_and_what_is_not_ignored() -> None:
    copied = [
        name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", CONTAINER, re.MULTILINE) for name in line.split()
    ]
    assert "src" in copied
    assert all((ROOT / name).exists() for name in copied)
    kept = {line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == set(copied)


def test_the_unit_runs_a_command_that_exists() -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)
    check_serve(shlex.split(line))
    assert "DynamicUser=yes" in UNIT


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    (tmp_path / "mmi.service").write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", UNIT))
    ran = subprocess.run(["systemd-analyze", "verify", str(tmp_path / "mmi.service")], capture_output=True, text=True,
                         timeout=60, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "mmi.service" not in ran.stderr  # where it reports keys that it ignores
