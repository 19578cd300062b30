"""What docs/guides/serving.md shows works: its examples run against a server on the stub engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import httpx2
import pytest

from mm_interleaved.configuration import load_config
from mm_interleaved.serving import schema
from mm_interleaved.serving.config import LimitConfig, ServeConfig
from mm_interleaved.serving.stub import StubEngine

from .conftest import running

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/guides/serving.md").read_text()
README = (ROOT / "README.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", TEXT, re.DOTALL))
ADDRESS = "http://127.0.0.1:8000"


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running(StubEngine("small")) as address:
        yield address


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.endswith(".py")])
def test_python(server: str, place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert ADDRESS in EXAMPLES[name]
    exec(compile(EXAMPLES[name].replace(ADDRESS, server), name, "exec"), {"__name__": "example"})
    said = capsys.readouterr().out
    expected = {
        "create.py": "", "stream.py": "[preview 1]", "conversation.py": "tokens needed no processing",
        "chat.py": "data:image/png;base64,", "images.py": "2 images", "aiohttp.py": "response.completed",
    }  # fmt: skip
    assert expected[name] in said
    if name == "create.py":
        assert list(place.glob("image_*.png"))
    if name == "stream.py":
        assert said.endswith("completed\n")


def test_shell(server: str, place: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    run = subprocess.run(["sh", "-e", "-c", EXAMPLES["curl"].replace(ADDRESS, server)], capture_output=True, text=True,
                         timeout=60)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert '"object":"response"' in run.stdout
    assert "event: response.completed" in run.stdout
    assert '"status":"ok"' in run.stdout


def test_settings(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text(EXAMPLES["serve.yaml"])
    config = load_config(tmp_path / "serve.yaml", ServeConfig)
    assert (config.rows, config.limits.steps, config.template) == (16, 50, "chat")


def test_every_limit_is_listed_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", section("Limits"), re.MULTILINE))
    assert {name: float(value) for name, value in listed.items()} == {
        field.name: getattr(LimitConfig(), field.name) for field in fields(LimitConfig)
    }


def test_every_field_of_our_own_is_listed() -> None:
    listed = set(
        re.findall(r"^\| `(\w+)` \|", section("Our own fields").split("| field of an answer")[0], re.MULTILINE)
    )
    assert listed == {*schema.Sampling.model_fields, "max_images", "inspect"}
    refused = section("Our own fields").split("Refused as well")[1]
    for name in ("logit_bias", "stop", "reasoning"):
        assert f"`{name}`" in refused
        assert name not in schema.ChatRequest.model_fields | schema.ResponseRequest.model_fields


def test_every_metric_is_listed(server: str) -> None:
    kinds = re.findall(r"^# TYPE (\w+) (\w+)$", httpx2.get(f"{server}/metrics", trust_env=False).text, re.MULTILINE)
    served = {name for name, _ in kinds if not name.endswith("_created")}
    assert served == set(re.findall(r"`(mmi_\w+)`", section("Running it")))


def test_codes_of_errors_exist() -> None:
    source = "".join(path.read_text() for path in (ROOT / "src/mm_interleaved/serving").glob("*.py"))
    codes = re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| \d.*$", section("Errors"), re.MULTILINE)))
    assert len(codes) > 15
    assert not [code for code in codes if f'"{code}"' not in source and code not in ("param",)]


def test_the_readme(server: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.split("### As a server")[1].split("\n##")[0], re.DOTALL)
    exec(compile(code.replace(ADDRESS, server), "README.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip()


def test_the_extra_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "serve" in extras
    assert "pip install '.[serve]'" in TEXT


def test_options_of_the_command() -> None:
    said = subprocess.run([sys.executable, "-m", "mm_interleaved.cli", "serve", "--help"], capture_output=True,
                          text=True, env={"PATH": "", "COLUMNS": "200", "PYTHONPATH": str(ROOT / "src")})  # fmt: skip
    for option in set(re.findall(r"^mmi serve.*?(--\w+)", TEXT, re.MULTILINE)) | {"--stub", "--config", "--name"}:
        assert option in said.stdout, said.stderr
