"""What starting costs: no command imports PyTorch for its help, and the package imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mm_interleaved.checkpoints.hub import SETS
from mm_interleaved.checkpoints.quantization import QUANTIZATIONS
from mm_interleaved.generation import IMAGE_PRESETS, TEXT_PRESETS
from mm_interleaved.model.config import PRESETS
from mm_interleaved.tasks.prepare import CONVERTERS

HEAVY = ("torch", "transformers", "numpy", "diffusers", "accelerate", "PIL")
WALK = f"""
import sys
from typer.main import get_command
from mm_interleaved.cli import app, main

def walk(command, path):
    yield path
    for name in sorted(getattr(command, "commands", {{}})):
        yield from walk(command.commands[name], [*path, name])

for path in walk(get_command(app), []):
    try:
        main([*path, "--help"])
    except SystemExit as end:
        assert end.code in (0, None), path
    found = [name for name in {HEAVY!r} if name in sys.modules]
    assert not found, (path, found)
    print("shown:", *path)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_help_of_every_command_is_light_and_silent() -> None:
    done = python(WALK)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    shown = [line.removeprefix("shown:").strip() for line in done.stdout.splitlines() if line.startswith("shown:")]
    assert {"", "generate", "train", "evaluate", "data check", "data prepare", "bench"} <= set(shown)


def test_the_list_of_recipes_is_light() -> None:
    done = python(
        "import sys\nfrom mm_interleaved.cli import main\n"
        "try:\n    main(['finetune'])\nexcept SystemExit as end:\n    assert end.code in (0, None)\n"
        f"assert not [n for n in {HEAVY!r} if n in sys.modules]"
    )
    assert done.returncode == 0, done.stderr
    assert "own-folder" in done.stdout


def test_importing_the_package_is_light() -> None:
    done = python(
        f"import sys, mm_interleaved\nprint([n for n in {HEAVY!r} if n in sys.modules], mm_interleaved.__version__)"
    )
    assert done.stdout.startswith("[] "), done.stdout + done.stderr


@pytest.mark.parametrize("first", ["mm_interleaved", "transformers"])
@pytest.mark.slow
def test_auto_classes_know_the_model_in_both_orders(first: str) -> None:
    second = {"mm_interleaved": "transformers", "transformers": "mm_interleaved"}[first]
    done = python(
        f"import {first}\nimport {second}\n"
        "from transformers import AutoConfig, AutoModel, AutoProcessor\n"
        "config = AutoConfig.for_model('mm_interleaved', **{})\n"
        "from mm_interleaved.pretrained import FOLDER\n"
        "model = AutoModel.from_pretrained(FOLDER / 'small')\n"
        "processor = AutoProcessor.from_pretrained(FOLDER / 'small')\n"
        "print(type(config).__name__, type(model).__name__, type(processor).__name__)"
    )
    assert done.stdout.split() == ["MMInterleavedConfig", "MMInterleaved", "MMInterleavedProcessor"], done.stderr


@pytest.mark.slow
def test_names_in_the_help_are_those_there_are() -> None:
    """Help is written out, since looking the names up would import PyTorch."""
    shown = {
        command: " ".join(
            python(f"from mm_interleaved.cli import main\nmain({[*command.split(), '--help']!r})").stdout.split()
        )
        for command in ("generate", "convert", "info", "download", "data prepare")
    }
    shown = {command: text.replace("│ │ ", "").replace("│", "") for command, text in shown.items()}
    for command, names in {
        "generate": [*TEXT_PRESETS, *IMAGE_PRESETS, *QUANTIZATIONS], "convert": PRESETS, "info": PRESETS,
        "download": SETS, "data prepare": CONVERTERS,
    }.items():  # fmt: skip
        missing = [name for name in names if name not in shown[command]]
        assert not missing, (command, missing)


def test_the_version_is_shown() -> None:
    done = subprocess.run([sys.executable, "-m", "mm_interleaved", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("mm-interleaved ")
