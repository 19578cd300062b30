"""The guide and the tutorials of fine-tuning do what they say."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mm_interleaved.cli.finetune import PAGE
from mm_interleaved.configuration import load_config
from mm_interleaved.evaluation import EvaluateConfig
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.recipe_list import list_recipes

from ..cli.conftest import Outcome, mmi
from .conftest import ROOT

__all__ = ["mmi"]
GUIDE = ROOT / "docs/guides/finetuning.md"
TUTORIALS = ROOT / "docs/tutorials"
QUICK = {  # few steps and samples; the rest is as it stands
    "finetune": ["steps=1", "data.batch_size=1", "samples.count=1", "samples.num_inference_steps=1",
                 "samples.max_new_tokens=2", "log_every=1", "tensorboard=false"],
    "generate": ["num_inference_steps=1", "max_new_tokens=2", "--device", "cpu"],
    "toyworld": ["--workers", "1"],
    "evaluate": ["--device", "cpu"],
}  # fmt: skip
MMI = Callable[..., Outcome]


def examples(page: Path) -> dict[str, str]:
    """The marked blocks of a page by name."""
    return dict(re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", page.read_text(), re.DOTALL))


def follow(page: Path, mmi: MMI) -> None:
    """Write the files of a page and run its commands one after another, in the present folder."""
    found = examples(page)
    for name, text in found.items():
        if "." in name:
            Path(name).write_text(text)
    for name, text in found.items():
        for line in text.splitlines() if "." not in name else []:
            program, *arguments = shlex.split(line, comments=True)
            if program == "python":
                exec(compile(found[arguments[0]], arguments[0], "exec"), {"__name__": "example"})
                continue
            assert program == "mmi"
            changes = list(QUICK.get(arguments[0], [])) if len(arguments) > 1 else []
            if "-n" in arguments:
                arguments[arguments.index("-n") + 1] = "5"
            if arguments[0] == "finetune" and len(arguments) > 1:
                changes += ["evaluation.tasks.0.limit=2", "evaluate_every=1"] if "mine.yaml" in arguments else []
                changes += ["--device", "cpu"]
            said = mmi(*arguments, *changes)
            assert said.code == 0, said.err


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_tutorial_about_a_style(elsewhere: Path, mmi: MMI) -> None:
    follow(TUTORIALS / "own-images.md", mmi)
    run = elsewhere / "runs/finetune/own-folder"
    assert {PAGE, "report.html", "final", "loss.png"} <= {path.name for path in run.iterdir()}
    assert "step 0" in (run / "report.html").read_text()
    assert (elsewhere / "drawn/report.html").is_file()
    assert (elsewhere / "runs/captions/final").is_dir()


@pytest.mark.slow
def test_the_tutorial_about_questions(elsewhere: Path, mmi: MMI) -> None:
    follow(TUTORIALS / "questions.md", mmi)
    assert (elsewhere / "runs/questions/final/adapter_model.safetensors").is_file()
    assert "vqav2/" in (elsewhere / "runs/questions/report.html").read_text()


@pytest.mark.slow
def test_the_tutorial_about_stories(elsewhere: Path, mmi: MMI) -> None:
    follow(TUTORIALS / "stories.md", mmi)
    assert (elsewhere / "story/report.html").is_file()


def test_every_recipe_is_listed() -> None:
    table = GUIDE.read_text().split("## Recipes")[1].split("\n## ")[0]
    named = {name for line in table.splitlines() if line.startswith("| `")
             for name in re.findall(r"`([\w-]+)`", line.split("|")[1])}  # fmt: skip
    assert named == set(list_recipes())


def test_the_settings_of_the_guide_exist(tmp_path: Path) -> None:
    found = examples(GUIDE)
    shutil.copy(ROOT / "configs/debug.yaml", tmp_path)
    (tmp_path / "replay.yaml").write_text("extends: debug.yaml\n" + found["replay.yaml"])
    replay = load_config(tmp_path / "replay.yaml", TrainConfig).replay
    assert replay is not None
    (tmp_path / "vqa.yaml").write_text(found["vqa.yaml"])
    assert load_config(tmp_path / "vqa.yaml", EvaluateConfig).tasks[0].task == "vqav2"


@pytest.mark.slow
def test_the_commands_of_the_guide(elsewhere: Path, mmi: MMI) -> None:
    """The real data are replaced by toy data in the same places."""
    shutil.copytree(ROOT / "examples", elsewhere / "examples")
    for split in ("train", "val"):
        folder = f"data-{split}"
        assert mmi("toyworld", "write", "--format", "vqav2", "--out", folder, "-n", 4, "--split", split).code == 0
        shutil.copytree(folder, "datasets/VQAv2", dirs_exist_ok=True)
        shutil.copytree(folder, "datasets/coco", dirs_exist_ok=True)
    follow(GUIDE, mmi)
    assert (elsewhere / "out/report.html").is_file()
    assert (elsewhere / "runs/finetune/vqa/evaluation/vqav2/gallery.html").is_file()
