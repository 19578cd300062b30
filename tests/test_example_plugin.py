"""The example package is installed as users install one, and `mmi` without any package installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from .programs import Program

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/guides/plugins.md").read_text()
(BLOCK,) = re.findall(r"<!-- example: dots -->\n```sh\n(.*?)```", GUIDE, re.DOTALL)
COMMANDS = [line.partition("#")[0].split()[1:] for line in BLOCK.splitlines() if line.startswith("mmi ")]
PROGRAM = """
import json, os, sys
from mm_interleaved.cli import main
path, folder, *arguments = sys.argv[1:]
sys.path[:] = json.loads(path)
os.chdir(folder)
main(arguments)
"""
Said = tuple[int | None, str]


def runner(folder: Path, path: list[str]) -> Callable[..., Said]:
    """`mmi` in processes of their own, in a folder and with another `sys.path`: exit status and what they said."""
    program = folder / "program.py"
    program.write_text(PROGRAM)

    def run(*arguments: object) -> Said:
        started = Program(str(program), json.dumps(path), folder, *arguments, merge=True)
        said, _ = started.communicate()
        return started.returncode, " ".join(said.split())

    return run


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the example package is installed in."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "examples/plugin", folder / "source")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(folder / "source")], check=True)
    return folder / "site"


@pytest.fixture
def mmi(installed: Path, tmp_path: Path) -> Callable[..., Said]:
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return runner(tmp_path, [str(installed), *sys.path])


@pytest.mark.slow
def test_the_commands_of_the_guide(mmi: Callable[..., Said], tmp_path: Path) -> None:
    """A command, a task, its metric and a source, as a reader would type them."""
    said = {}
    for command in COMMANDS:
        extra = ["--seconds", 0] if command[-1].endswith("train.yaml") and command[0] == "data" else []
        extra += ["--device", "cpu"] if command[0] in ("train", "evaluate") else []
        extra += ["steps=2", "save_every=0", "tensorboard=false"] if command[0] == "train" else []
        code, text = mmi(*command, *extra)
        assert code == 0, text
        said[" ".join(command[:3])] = text
    assert "8 samples, 8 images" in said["data check dots"]
    assert "done: runs/dots/final" in said["train examples/plugin/train.yaml"]
    rows = (tmp_path / "datasets/dots/answers.jsonl").read_text().splitlines()
    counts = {str(i): json.loads(row)["count"] for i, row in enumerate(rows)}
    results = json.loads((tmp_path / "runs/dots-evaluation/results.json").read_text())["tasks"]["dots"]
    lines = (tmp_path / "runs/dots-evaluation/dots/predictions.jsonl").read_text().splitlines()
    numbers = {r["id"]: int((re.findall(r"\d+", r["prediction"]) or ["0"])[0]) for r in map(json.loads, lines)}
    errors = [abs(numbers[key] - count) for key, count in counts.items()]
    assert results["metrics"]["count_error"]["values"]["count_error"] == pytest.approx(sum(errors) / 8)


def test_options_of_a_plugin_are_checked_like_all_settings(mmi: Callable[..., Said]) -> None:
    code, text = mmi("data", "check", "examples/plugin/train.yaml", "data.sources.0.options.mosst=3")
    assert code == 1
    assert "unknown key 'mosst' (source 'dots', options). Did you mean 'most'?" in text


def test_help_lists_commands_of_plugins_without_importing_them(installed: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "from mm_interleaved.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'mmi_dots', 'toyworld', 'torch', 'numpy'} & set(sys.modules)\n"
        "try: main(['toyworld', '--help'])\nexcept SystemExit: pass\n"
        "try: main(['dots', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "COLUMNS": "200"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "Plug-in `mmi_dots` of the package mmi-dots." in said
    assert "Plug-in `toyworld` of the package mm-interleaved." in said
    assert "Write the files of the task dots" in said
    assert "Write a data set in the files and folders of a published one." in said  # the toy world


@pytest.fixture
def checkout(tmp_path: Path) -> Callable[..., Said]:
    """`mmi` where the libraries are installed, but neither this package nor any plug-in."""
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.match("mm_interleaved|mmi_dots", path.name):
            (libraries / path.name).symlink_to(path)
    return runner(tmp_path, [str(ROOT / "src"), str(libraries), sysconfig.get_path("stdlib")])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["toyworld", "show"], "command 'toyworld'"),
        (["data", "check", "{debug}", "data.sources.0.type=toyworld"], "source type 'toyworld'"),
        (["data", "check", "dots"], "task 'dots'"),
        (["evaluate", "{evaluation}", "tasks.0.task=dots"], "task 'dots'"),
    ],
)
def test_a_plugin_that_is_not_installed_is_an_error_with_the_install_line(
    arguments: list[str], name: str, checkout: Callable[..., Said]
) -> None:
    files = {"debug": ROOT / "configs/debug.yaml", "evaluation": ROOT / "examples/plugin/evaluate.yaml"}
    code, text = checkout(*(a.format(**files) for a in arguments))
    assert code == (2 if name.startswith("command") else 1)
    assert f"unknown {name}" in text
    assert "pip install -e ." in text


@pytest.mark.slow
def test_all_but_plugins_works_from_a_checkout(checkout: Callable[..., Said], tmp_path: Path) -> None:
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in (
        ["train", "configs/debug.yaml", "--device", "cpu", "steps=1", "sample_every=0", "eval_every=0", "save_every=0",
         "tensorboard=false"],
        ["info", "runs/debug/final"],
        ["data", "check", "configs/debug.yaml", "--seconds", 0],
    ):  # fmt: skip
        code, text = checkout(*command)
        assert code == 0, text
