"""`mmi plan`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mm_interleaved.cli import app, main
from mm_interleaved.training.flops import peak_of
from mm_interleaved.training.gpus import GPUS

from .conftest import Outcome

ROOT = Path(__file__).parents[2]
DEBUG = str(ROOT / "configs/debug.yaml")


FEWER = ["losses.image=0", "steps=40"]  # no image loss, which takes half of the time to plan


@pytest.mark.slow
def test_a_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["plan", DEBUG, *FEWER, "--gpus", "2", "--type", "a100-40", "--images", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["gpu"]["name"], found["division"], found["fits"]) == (2, "a100-40", "DDP", True)
    assert found["sources"][0]["batch"] == {"rows": 2, "tokens": 96, "images": 2, "targets": 0}
    assert found["memory"]["total"] == sum(found["memory"]["parts"].values())
    assert found["days"] * 86400 == pytest.approx(40 * found["step_seconds"])


@pytest.mark.slow
def test_a_plan_as_tables(mmi: Callable[..., Outcome]) -> None:
    shown = mmi("plan", DEBUG, *FEWER).out
    for text in ("1 x h200 on one machine, one GPU", "tokens a second", "40 steps", "activations"):
        assert text in shown


@pytest.mark.slow
def test_a_recipe_is_planned_for_a_model_whose_files_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(
            [
                "plan",
                "vqa",
                *FEWER,
                "model.quantize=int8",
                "--model",
                "debug",
                "--lora",
                "llm",
                "--images",
                "4",
                "--json",
            ]
        )
    found = json.loads(capsys.readouterr().out)
    weights = found["memory"]["parts"]
    assert found["sources"][0]["name"] == "vqav2"
    assert 0 < weights["weights"] < weights["frozen weights"]  # the adapter alone is trained


def test_the_options_of_the_guide_are_those_of_the_command() -> None:
    guide = (ROOT / "docs/guides/scaling.md").read_text().partition("## Planning a run")[2].partition("## ")[0]
    shown = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "200"}).output
    options = set(re.findall(r"(--[a-z][a-z-]*)", guide))
    assert options >= {"--gpus", "--type", "--per-node", "--images", "--model", "--json"}
    assert not [option for option in options if option not in shown]
    kinds = re.search(r"kind of GPU: ([^|]+) \|", guide)
    assert kinds is not None
    assert kinds[1].split(", ") == list(GPUS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([DEBUG, "--type", "h20"], "--type 'h20' is none of b200, h200"),
        ([DEBUG, "--model", "large"], "--model 'large' is none of"),
        ([str(ROOT / "configs/release.yaml")], "For sizes without files: --model release"),
        (["vqa"], "no model is given"),
        (["vqaa", "--model", "small"], "there is no recipe 'vqaa'"),
        ([DEBUG, "--gpus", "12"], "12 GPUs do not fill machines of 8"),
    ],
)
def test_errors_say_what_to_do(words: list[str], message: str, mmi: Callable[..., Outcome]) -> None:
    outcome = mmi("plan", *words)
    assert outcome.code == 1
    assert message in outcome.err


def test_devices_are_known_by_the_names_of_their_drivers() -> None:
    names = {"NVIDIA H200": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 989, "NVIDIA GH200 480GB": 989,
             "NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA GeForce RTX 4090": 165}  # fmt: skip
    assert {name: peak_of(name) for name in names} == {name: 1e12 * value for name, value in names.items()}
    assert peak_of("NVIDIA L40") is None
