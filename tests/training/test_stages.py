"""`scripts/train_small_stages`: its stages, with a Python that only notes what it was asked for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from mm_interleaved.configuration import load_config
from mm_interleaved.training.config import TrainConfig
from toyworld.curriculum.config import AutoencoderRunConfig, PartRunConfig

from .conftest import ROOT

KINDS = {
    "train": TrainConfig, "train-vae": AutoencoderRunConfig, "train-vision": PartRunConfig,
    "train-language": PartRunConfig,
}  # fmt: skip
PYTHON = """#!/bin/bash
if [ "$1" = -c ]; then echo "$GPUS"; exit; fi
echo "${CUDA_VISIBLE_DEVICES:-all} $*" >> "$NOTES"
for word in "$@"; do case $word in output=*) mkdir -p "${word#output=}/final" ;; esac; done
"""


def asked(folder: Path, gpus: int) -> list[list[str]]:
    """The device(s), the command and its arguments, of every stage."""
    python = folder / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (folder / "notes").write_text("")
    variables = {"PATH": f"{python.parent}:{os.environ['PATH']}", "NOTES": str(folder / "notes"), "GPUS": str(gpus)}
    subprocess.run(
        [ROOT / "scripts/train_small_stages", folder / "runs"], env=variables, check=True, capture_output=True
    )
    lines = [line.split() for line in (folder / "notes").read_text().splitlines()]
    return [[line[0], *line[line.index("mm_interleaved.cli") + 1 :]] for line in lines]


@pytest.mark.parametrize("gpus", [1, 2])
def test_every_stage_has_settings_that_work(tmp_path: Path, gpus: int) -> None:
    stages = asked(tmp_path, gpus)
    made = set()
    for devices, *words in stages:
        command, file, *settings = words[words[0] == "toyworld" :]
        config = load_config(ROOT / file, KINDS[command], settings)
        assert config.schedule.kind in ("constant", "cosine", "linear")
        made.add(Path(config.output).name)
        assert devices == "all" or int(devices) < gpus
        if command == "train":
            needed = (config.model.init_from.checkpoint, *(entry.source for entry in config.model.weights))
            assert {Path(folder).parent.name for folder in needed if folder is not None} <= made
    assert made == {"vae", "vision", "language", "read", "conditions", "draw", "read_more", "pretrain"}
    assert asked(tmp_path, gpus) == []  # what is done is not done again


def test_it_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        asked(tmp_path, 0)
    assert b"there is no GPU here" in error.value.stderr
